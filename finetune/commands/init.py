"""Writes an argument file: from a shipped one, from options alone, or from the answers to a few questions."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.commands.first_arguments import (
    FirstArguments,
    find_arguments,
    fit_to_data,
    fit_to_machine,
    look_at_data,
    look_at_model,
    read_shipped,
)
from finetune.errors import UserError
from finetune.machine.command_names import PROGRAM, TRAIN, called_as, launched_name
from finetune.machine.command_parser import CommandParser
from finetune.machine.language.translation import translate
from finetune.machine.screen import print_text
from finetune.settings.argument_file import ENDINGS, is_argument_file, read_argument_file
from finetune.settings.arguments import parse_arguments
from finetune.settings.parsing import read_given
from finetune.settings.records import LAYOUT
from finetune.settings.registry import known_settings
from finetune.settings.yaml_output import format_yaml
from finetune.storage.files import write_atomically, write_json
from finetune.storage.shipped_files import sample_data, shipped_arguments

_MODEL, _DATA = "model_name_or_path", "dataset_name_or_path"
_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "GIB": 1 << 30, "MIB": 1 << 20}


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the file and says what comes next.

    Raises:
        UserError: A value cannot be used, something is missing and nobody can be asked, or the file is there.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and not words[0].startswith("-") else None
    options, rest = _parser().parse_known_args(words)
    if options.list:
        print(*shipped_arguments(), sep="\n")
        return
    if name is None and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
    given = read_given(rest)
    if given.faults:
        raise UserError(given.faults)
    memory_bytes = None if options.memory is None else _read_size(options.memory)
    settings = dict(given.values)
    if options.sample_data and _DATA in settings:
        raise UserError(f"--sample_data and --{_DATA} {settings[_DATA]} exclude each other: give one of them")
    first, title = _from_shipped(name) if name else _from_model(settings, options.method, options.sample_data)
    target = options.output_file or Path(f"{title.replace('/', '_')}_argument.json")
    if not is_argument_file(target.name):
        raise UserError(f"--output_file {target} must end in one of {', '.join(ENDINGS)}: it is JSON or YAML")
    if target.exists() and not options.overwrite:
        raise UserError(f"{target} is there: add --overwrite, or another name with --output_file")
    first.values |= settings
    _fit(first, settings, memory_bytes, is_sample=options.sample_data)
    _check(first.values)
    if options.sample_data:
        _copy_sample_data(Path("data"))
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix.lower() == ".json":
        write_json(target, first.values)
    else:
        write_atomically(target, format_yaml(first.values).encode())
    _tell(first, target)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=f"{called_as() or PROGRAM} init",
        usage=f"{called_as() or PROGRAM} init [NAME] [options] [--key value ...]",
        description="Write an argument file. NAME is a shipped file such as llama/lora, or a file of your own; without "
        "it the model and the data decide, and what is not given is asked for. Every setting of a run may follow as "
        "--key value.",
        allow_abbrev=False,
    )
    parser.add_argument("--list", action="store_true", help="list the shipped files")
    parser.add_argument(
        "--method", help="lora, sft, pt, dpo, kto and so on, as in the names of the shipped files"
    )
    parser.add_argument(
        "--output_file",
        type=Path,
        help="the file to write, in YAML with comments if it ends in .yaml (FAMILY_METHOD_argument.json)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.add_argument(
        "--sample_data", action="store_true", help="copy the sample data to ./data and train on them"
    )
    parser.add_argument("--memory", help="of one card, or of the machine without one: 24GB (what is free)")
    return parser


def _read_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise UserError(f"--memory is {text}: write a size such as 24GB or 512MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _from_shipped(name: str) -> tuple[FirstArguments, str]:
    shipped = shipped_arguments()
    short = name.removesuffix(".json").removesuffix("_argument")
    if short not in shipped and is_argument_file(name) and Path(name).exists():
        return _read_own(Path(name)), Path(name).stem.removesuffix("_argument")
    if short not in shipped:
        from difflib import get_close_matches

        near = get_close_matches(short, shipped, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "--list shows the names"
        raise UserError(f'no argument file is named "{name}": {hint}')
    return read_shipped(shipped[short]), short


def _read_own(path: Path) -> FirstArguments:
    """The settings of a file of one's own."""
    faults: list[str] = []
    entries = read_argument_file(path, faults)
    if entries is None or faults:
        raise UserError(faults)
    return FirstArguments({key: value for key, value in entries.values.items() if key != "$schema"})


def _from_model(settings: dict[str, Any], method: str | None, is_sample: bool) -> tuple[FirstArguments, str]:
    """Asks for what is not given, and takes the shipped file of family and method."""
    if _MODEL not in settings:
        settings[_MODEL] = _ask("Model (a folder, or a name on a hub)", f"--{_MODEL}")
    family, is_multimodal = look_at_model(str(settings[_MODEL]))
    if is_sample:
        method = method or "lora"
    elif _DATA not in settings:
        settings[_DATA] = _ask("Data (a folder with train.json, or a file)", f"--{_DATA}, or --sample_data")
    if method is None:
        facts = look_at_data(str(settings[_DATA]))
        methods = sorted({name.partition("/")[2] for name in shipped_arguments()})
        method = _ask_or(f"Method ({', '.join(methods)})", facts.method)
    path = find_arguments(family, method)
    if path is None:
        raise UserError(f'there is no method "{method}": init --list shows them behind the family')
    first = read_shipped(path)
    first.values["output_dir"] = f"./checkpoints/{family}_{method}"
    if is_multimodal:
        first.values["text_only"] = True
        first.notes.append("text_only true: the model is multimodal, and its text part alone is trained")
    return first, f"{family}/{method}"


def _can_ask() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _ask(question: str, option: str) -> str:
    """An answer of at least one character."""
    if not _can_ask():
        raise UserError(
            f"{option.split(',')[0].lstrip('-')} is missing, and there is no terminal to ask on: give {option}"
        )
    while True:
        if answer := _read_answer(f"{question}: "):
            return answer


def _ask_or(question: str, default: str) -> str:
    """An answer, or the default where nobody can be asked or nothing is typed."""
    return (_read_answer(f"{question} [{default}]: ") or default) if _can_ask() else default


def _read_answer(question: str) -> str:
    try:
        return input(translate(question)).strip()
    except EOFError:
        raise UserError("the questions were not answered to the end: nothing was written") from None


def _fit(
    first: FirstArguments, settings: dict[str, Any], memory_bytes: int | None, *, is_sample: bool
) -> None:
    """Fits to data and machine; what the user gave stays."""
    data = str(first.values.get(_DATA, ""))
    if _DATA in settings:
        fit_to_data(first, look_at_data(data))
    elif not Path(data).exists() and not is_sample:
        first.notes.append(
            f"{_DATA} {data} is not there yet: put your data there, or start again with --sample_data"
        )
    fit_to_machine(first, memory_bytes=memory_bytes)
    first.values |= settings


def _check(values: dict[str, Any]) -> None:
    """Has the parser of runs look at the settings, but for what is only there later: data, and other processes."""
    layout = {name for name, setting in known_settings().items() if LAYOUT in setting.readers}
    looked_at = {name: value for name, value in values.items() if name not in layout} | {
        _DATA: str(sample_data())
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arguments.json"
        path.write_text(json.dumps(looked_at), encoding="utf-8")
        try:
            parse_arguments([str(path)])
        except UserError as error:
            raise UserError([fault.replace(f" in {path}", "") for fault in error.faults]) from None


def _copy_sample_data(folder: Path) -> None:
    """Copies the sample data; files that are there stay as they are."""
    for path in sorted(sample_data().rglob("*.json")):
        target = folder / path.relative_to(sample_data())
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _tell(first: FirstArguments, target: Path) -> None:
    num_processes = first.values.get("tensor_parallel_degree", 1) * first.values.get(
        "pipeline_parallel_degree", 1
    )
    program = called_as() or PROGRAM
    train = f"{program} train {target}"
    if num_processes > 1:
        cards = ",".join(map(str, range(num_processes)))
        train = f"python -m paddle.distributed.launch --gpus {cards} {launched_name(TRAIN)} {target}"
    print_text(f"wrote the settings to {target}", *first.notes)
    print_text(f"next: {program} preview {target}\n      {train}")
