"""Write finetune/settings/training_arguments.json from the installed PaddleNLP.

The file lets the argument parser know PaddleNLP's TrainingArguments without importing it. Run this after
changing the PaddleNLP version: names, types, defaults and choices come from the installed class, help texts
stay as they are in the file, and a new setting gets an empty help text to fill in by hand (a test notices).

    python tools/record_training_arguments.py [--check]
"""

import argparse
import dataclasses
import enum
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

RECORD_FILE = Path(__file__).resolve().parents[1] / "finetune" / "settings" / "training_arguments.json"

# PaddleNLP checks these against fixed lists without an enum type on the field.
_CHOICES_BY_NAME = {
    "fp16_opt_level": ["O0", "O1", "O2"],
    "ckpt_quant_stage": ["O0", "O1", "O2"],
    "report_to": ["visualdl", "wandb", "tensorboard", "autonlp", "all", "none"],
    "hybrid_parallel_topo_order": ["pp_first", "sharding_first"],
}


def describe_type(hint: Any) -> str:
    """The type's name as an argument file uses it; Optional is dropped, an enum is a str."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        return describe_type(members[0])
    if typing.get_origin(hint) is list:
        return f"list[{describe_type(typing.get_args(hint)[0])}]"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "str"
    return hint.__name__


def list_choices(name: str, hint: Any) -> list[str]:
    """The values PaddleNLP accepts for a setting, empty where it does not list them."""
    from paddlenlp.trainer.trainer_utils import OptimizerNames, SchedulerType

    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [member.value for member in hint]
    enums = {"lr_scheduler_type": SchedulerType, "optim": OptimizerNames}
    if name in enums:
        return [member.value for member in enums[name]]
    return _CHOICES_BY_NAME.get(name, [])


def read_installed() -> list[dict[str, Any]]:
    """Name, type, default and choices of every field of the installed TrainingArguments."""
    from paddlenlp.trainer import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    entries = []
    for field in dataclasses.fields(TrainingArguments):
        hint = hints[field.name]
        entry: dict[str, Any] = {
            "name": field.name,
            "type": describe_type(hint),
            "default": None if field.default is dataclasses.MISSING else field.default,
        }
        if choices := list_choices(field.name, hint):
            entry["choices"] = choices
        entries.append(entry)
    return entries


def format_record(version: str, entries: list[dict[str, Any]]) -> str:
    """The file's text: one setting a line, so that a change of version reads well as a diff."""
    lines = ",\n".join("    " + json.dumps(entry, ensure_ascii=False) for entry in entries)
    return f'{{\n  "paddlenlp": {json.dumps(version)},\n  "settings": [\n{lines}\n  ]\n}}\n'


def main() -> int:
    """Write the file, or with --check say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail when the file is not current"
    )
    options = parser.parse_args()
    import paddlenlp

    recorded = json.loads(RECORD_FILE.read_text(encoding="utf-8"))["settings"] if RECORD_FILE.exists() else []
    help_by_name = {entry["name"]: entry["help"] for entry in recorded}
    entries = [{**entry, "help": help_by_name.get(entry["name"], "")} for entry in read_installed()]
    text = format_record(paddlenlp.__version__, entries)
    if options.check:
        return int(not RECORD_FILE.exists() or RECORD_FILE.read_text(encoding="utf-8") != text)
    RECORD_FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
