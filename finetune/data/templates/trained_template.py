"""The chat template that a model or an adapter was trained with, kept with it through merges and exports.

A run notes it in arguments.json, which belongs to the run and is not copied. What is made of the run gets
`RECORD_FILE`: the name of the template, or of the copy of a template file that lies beside it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.templates.default_template import family_format
from finetune.data.templates.jinja_forms import JINJA_FORMS, SWITCH
from finetune.data.templates.own_templates import DEFAULT, read_own_templates
from finetune.machine.screen import print_text
from finetune.storage.files import read_json_object, read_json_or_empty, read_text, write_json

if TYPE_CHECKING:
    from finetune.families.family import TokenizerFacts

RECORD_FILE = "trained_template.json"
PATTERN = "trained_template*"
"""Files of ours: the record and the copy of a template file."""

RUN_FILE = "arguments.json"
_COPY_STEM = "trained_template_source"
_KEY = "chat_template"
_SYSTEM = "system"
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def trained_template(folder: Path) -> str | None:
    """What the setting ``chat_template`` was when a folder's weights were trained.

    A checkpoint without a note of its own belongs to the run whose folder it lies in.

    Returns:
        A name or the path of a file, as `load_template` takes it; None where nothing is known.
    """
    note = _find_note(folder)
    if _KEY not in note:
        return None
    return _located(note[_KEY], [folder, Path(str(note.get("model_name_or_path") or folder))])


def trained_system(folder: Path) -> str | None:
    """The system text that examples without one of their own were trained with; None where there was none."""
    system = _find_note(folder).get(_SYSTEM)
    return system if isinstance(system, str) else None


def trained_thinking(folder: Path) -> bool | None:
    """What the template was told of thoughts before answers in training; None where nothing."""
    switch = _find_note(folder).get(SWITCH)
    return switch if isinstance(switch, bool) else None


def record_default(folder: Path, tokenizer_folder: Path, *, uses_own: bool) -> None:
    """Notes in a run's folder which template was trained where the setting leaves it to the model.

    Args:
        folder: The run's.
        tokenizer_folder: Where the template was looked for.
        uses_own: Whether any example was written by the model's own template, or by that of its family.
    """
    from finetune.data.templates.template import OWN_NAME, PLAIN_NAMES, has_own_template

    name = PLAIN_NAMES[0]
    if uses_own:
        name = (not has_own_template(tokenizer_folder) and family_format(tokenizer_folder)) or OWN_NAME
    write_json(folder / RECORD_FILE, {_KEY: name})


def _find_note(folder: Path) -> dict[str, Any]:
    """What is noted in a folder; a run's settings, with the template that was taken where they name none."""
    places = [folder]
    if _CHECKPOINT.fullmatch(folder.absolute().name):
        places.append(folder.absolute().parent)
    for place in places:
        run, record = (read_json_or_empty(place / name) for name in (RUN_FILE, RECORD_FILE))
        if _KEY in run:
            return run if run[_KEY] is not None else {**run, **record}
        if _KEY in record:
            return record
    return {}


def carry_template(sources: Sequence[Path], target: Path) -> str | None:
    """Notes in a folder the template that the first of some folders was trained with.

    Args:
        sources: Folders of the adapters and the model, what counts most first.
        target: Folder of the result.

    Returns:
        The template; None where no source knows one, and `target` stays as it is.
    """
    name = next((found for source in sources if (found := trained_template(source)) is not None), None)
    if name is None:
        return None
    drop_template(target)
    path, recorded = Path(name), name
    if not _is_name(name):
        if path.is_file():
            recorded = _COPY_STEM + path.suffix
            shutil.copyfile(path, target / recorded)
        elif (source := _find_named(name, sources)) is not None:
            recorded = f"{_COPY_STEM}.jinja"
            (target / recorded).write_text(source, encoding="utf-8")
        else:
            print_text(
                f"note: the template file {name} of the training is not there: give it with --chat_template later"
            )
    told = next(source for source in sources if trained_template(source) is not None)
    told_of = {_SYSTEM: trained_system(told), SWITCH: trained_thinking(told)}
    write_json(
        target / RECORD_FILE,
        {_KEY: recorded} | {key: value for key, value in told_of.items() if value is not None},
    )
    return name


def drop_template(folder: Path) -> None:
    """Removes what `carry_template` wrote."""
    for path in folder.glob(PATTERN):
        path.unlink()


def template_source(folder: Path, tokenizer: TokenizerFacts) -> str | None:
    """The template of a folder as jinja text for transformers.

    Args:
        folder: Where `carry_template` has noted it.
        tokenizer: How the model's sequences are framed.

    Returns:
        The text; None where there is none or jinja of one piece cannot express it.
    """
    from finetune.data.templates.chat_jinja import with_switch, with_system, write_jinja
    from finetune.data.templates.chat_templates import CHAT_FORMATS
    from finetune.data.templates.template import OWN_NAME

    name, system, switch = trained_template(folder), trained_system(folder), trained_thinking(folder)
    if name == OWN_NAME and (system or switch is not None):  # else the folder's own template is left as it is
        own = _own_source(folder)
        return with_switch(with_system(own, system), switch) if own is not None else None
    if name in JINJA_FORMS:
        return with_switch(with_system(JINJA_FORMS[name].source, system), switch)
    if name is None or _is_name(name):
        if name not in CHAT_FORMATS:
            return None
        chat = CHAT_FORMATS[name]
        return write_jinja(chat if system is None else replace(chat, default_system=system), tokenizer)
    path = Path(name)
    if not path.is_file():
        named = _find_named(name, [folder])
        return None if named is None else with_switch(with_system(named, system), switch)
    source = read_json_object(path).get(_KEY) if path.suffix == ".json" else read_text(path)
    return with_switch(with_system(source, system), switch) if isinstance(source, str) else None


def _own_source(folder: Path) -> str | None:
    """The jinja text of a tokenizer's folder; None where it has none."""
    return read_own_templates(folder).by_name.get(DEFAULT)


def _find_named(name: str, folders: Sequence[Path]) -> str | None:
    """The text of a template that one of some folders has under a name."""
    found = (read_own_templates(folder).by_name.get(name) for folder in folders if folder.is_dir())
    return next((text for text in found if text is not None), None)


def _located(value: object, folders: Sequence[Path]) -> str:
    """A template's name, or the path of its file as it is found from here."""
    from finetune.data.templates.template import PLAIN_NAMES

    name = PLAIN_NAMES[0] if value is None else str(value)
    if not _is_name(name):
        # Beside the record first: a copy is never meant to be taken from the working directory.
        own = [folders[0] / name] if name.startswith(_COPY_STEM) else []
        for path in (*own, Path(name), *(folder / name for folder in folders)):
            if path.is_file():
                return str(path)
    return name


def _is_name(name: str) -> bool:
    from finetune.data.templates.chat_templates import CHAT_FORMATS
    from finetune.data.templates.template import OWN_NAME, PLAIN_NAMES

    return name in (*CHAT_FORMATS, *JINJA_FORMS, *PLAIN_NAMES, OWN_NAME)
