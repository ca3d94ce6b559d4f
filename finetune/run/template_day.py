"""The date that a chat template writes: that of the day on which the run began, however often it is continued."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING

from finetune.data.templates.template import asks_for_time
from finetune.data.templates.template_clock import set_day
from finetune.run.tokenizer import tokenizer_folder
from finetune.storage.files import read_json_or_empty, write_json

if TYPE_CHECKING:
    from finetune.run.directory import RunDirectory
    from finetune.settings.arguments import Arguments

DAY_FILE = "template_day.json"


def choose_day(run: RunDirectory, args: Arguments) -> None:
    """Decides the date where the template asks for it: a run that continues, or is evaluated, keeps that of its data.

    Args:
        run: Where it continues is decided; gets the day.
        args: The arguments of the run.
    """
    if not asks_for_time(args.data.chat_template, tokenizer_folder(args)):
        return
    is_new = args.training.do_train and run.resume is None and not (run.trained or run.finished)
    place = run.resume.parent if run.resume else run.path
    noted = {} if is_new else read_json_or_empty(place / DAY_FILE)
    run.template_day = noted["day"] if _is_day(noted.get("day")) else date.today().isoformat()
    if args.training.do_train and not run.finished:
        write_json(run.path / DAY_FILE, {"day": run.template_day})


def _is_day(value: object) -> bool:
    try:
        date.fromisoformat(str(value))
    except ValueError:
        return False
    return isinstance(value, str)


def use_day(run: RunDirectory) -> list[str]:
    """Tells this process' templates the date; the line that says so, where one asks for it."""
    set_day(run.template_day)
    if run.template_day is None:
        return []
    return [f"The chat template writes the date: {run.template_day}, the day on which this run began"]
