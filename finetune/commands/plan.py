"""Tells what a run will be before it is started: parameters, layout, steps, memory of a card, disk, time.

Only config.json and the lengths of the samples are read: no weights, and no Paddle unless the tokenizer is one that
only PaddleNLP reads. Exit code 1 says that the run does not fit the card that was given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import EXIT_FAILED, UserError
from finetune.machine.command_names import called_as
from finetune.machine.command_parser import CommandParser
from finetune.machine.device import device_kind
from finetune.machine.language.translation import translate_piece
from finetune.machine.screen import show_line
from finetune.settings.arguments import parse_arguments
from finetune.settings.parsing import read_given

if TYPE_CHECKING:
    from finetune.models.resolve import ResolvedModel
    from finetune.processes.layout import Layout
    from finetune.run.plan.batches import BatchPlan
    from finetune.settings.arguments import Arguments

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", re.IGNORECASE)
_FACTORS = {"": 1 << 30, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_USABLE_SHARE = 0.95
"""Of a card: the rest is lost between the blocks of its allocator."""
_DEGREES = ("tensor_parallel_degree", "pipeline_parallel_degree", "sharding_parallel_degree")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan of a run; returns 0, or 1 where it does not fit.

    Args:
        argv: The words after the command's name; None takes those of this process.

    Raises:
        UserError: The settings, the model or the data cannot be used, as in a run.
    """
    options, words = _read_options(list(sys.argv[1:] if argv is None else argv))
    given = read_given(words).values
    if options.card_memory is not None and "device" not in given:
        words += ["--device", "gpu"]
    num_cards = _count_cards(options, given)
    with _as_launched(num_cards):
        args = parse_arguments(words, is_elsewhere=True)
        return _run(args, options)


def _read_options(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = CommandParser(
        prog=f"{called_as() or 'paddle-finetune'} plan",
        usage="%(prog)s FILE [options] [--key value ...]",
        description="Tell what a run will be before it is started: parameters, layout, steps, memory, disk, time. "
        "The settings are those of train; --device gpu plans for cards that this machine need not have.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--card_memory", type=_read_size, help="memory of a card, such as 24GB: exit code 1 if it is short"
    )
    parser.add_argument(
        "--num_cards", type=_read_count, help="cards, or processes, of the run; as many as its degrees need"
    )
    parser.add_argument(
        "--tokens_per_second", type=_read_speed, help="speed of all cards together, for the time"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser.parse_known_args(words)


def _read_size(text: str) -> float:
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]) > 0:
        raise UserError(f"card_memory is {text!r}: give a size above 0 such as 24GB or 40960MB")
    return float(match[1]) * _FACTORS[match[2].upper()]


def _read_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 16:
        raise UserError(f"num_cards is {text!r}: give a whole number from 1 to {1 << 16}")
    return int(text)


def _read_speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not 0 < speed < math.inf:
        raise UserError(f"tokens_per_second is {text!r}: give a number above 0")
    return speed


def _count_cards(options: argparse.Namespace, given: Mapping[str, Any]) -> int:
    """The cards that were given, or what the degrees need."""
    if options.num_cards is not None:
        return int(options.num_cards)
    from finetune.processes.layout import count_processes

    needed = math.prod(max(int(given.get(name) or 1), 1) for name in _DEGREES)
    return max(needed, count_processes())


@contextmanager
def _as_launched(num_processes: int) -> Iterator[None]:
    """Has settings be checked as in a launch of that many processes."""
    before = os.environ.get("PADDLE_TRAINERS_NUM")
    os.environ["PADDLE_TRAINERS_NUM"] = str(num_processes)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PADDLE_TRAINERS_NUM"]
        else:
            os.environ["PADDLE_TRAINERS_NUM"] = before


def _run(args: Arguments, options: argparse.Namespace) -> int:
    from finetune.run.plan.nearest import find_changes
    from finetune.run.plan.run_plan import make_plan
    from finetune.run.plan.screen import describe_fit, describe_plan, existing_folder, plan_to_json

    if not args.training.do_train:
        raise UserError("do_train is false: a plan is made of a training, so set do_train to true")
    resolved, layout, batches, notes = _look(args)
    plan = make_plan(args, resolved, layout, batches, tokens_per_second=options.tokens_per_second)
    card = options.card_memory
    share = 1.0 if device_kind(str(args.training.device)) == "cpu" else _USABLE_SHARE
    limit = None if card is None else card * share
    fits = limit is None or plan.peak <= limit
    changes = None if fits or limit is None else find_changes(args, resolved, plan, limit)
    if options.json:
        fact = None if card is None else fits
        print(json.dumps(plan_to_json(plan, card=card, fits=fact, changes=changes), indent=2))
        return 0 if fits else EXIT_FAILED
    for note in (*args.warnings, *notes):
        show_line(note if note.startswith("warning") else f"note: {note}")
    free = shutil.disk_usage(existing_folder(Path(str(args.training.output_dir)))).free
    _print(describe_plan(plan, free_bytes=free))
    if card is not None and limit is not None:
        _print(describe_fit(plan, card, limit, changes))
    return 0 if fits else EXIT_FAILED


def _print(lines: Iterator[str]) -> None:
    from finetune.run.plan.screen import fold

    for line in fold(map(translate_piece, lines)):
        print(line)


def _look(args: Arguments) -> tuple[ResolvedModel, Layout, BatchPlan, list[str]]:
    """The model, the layout and what the data come to, found and checked as a run does."""
    from finetune.models.resolve import resolve_model
    from finetune.run.alignment import comparison_of, gives_rewards
    from finetune.run.data import check_positions, find_files, read_data
    from finetune.run.plan.run_plan import plan_rows
    from finetune.run.preview.encoder import load_preview_encoder
    from finetune.run.processes import plan_layout
    from finetune.run.start_model import check_start
    from finetune.run.tokenizer import TokenizerPair

    resolved = resolve_model(str(args.model.model_name_or_path), needs_weights=False)
    resolved, notes = check_start(args, resolved)
    layout = plan_layout(args, resolved)
    files = find_files(args)
    encoder, note = load_preview_encoder(args, resolved)
    pair = TokenizerPair(tokenizer=None, encoder=encoder)
    data = read_data(args, files, pair)
    check_positions(data, args.data, resolved, comparison_of(args), reads_ends=gives_rewards(args))
    return resolved, layout, plan_rows(args, data, pair, resolved, layout), [*notes, *filter(None, [note])]
