"""The command line: python -m finetune.models.tiny llama ./tiny-llama."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.machine.command_names import TINY, usage_name
from finetune.machine.command_parser import CommandParser
from finetune.machine.command_start import start_command

if __name__ == "__main__":  # until `run_command`: the imports below take a moment
    start_command()

from finetune.families.family import families
from finetune.models.tiny.checkpoint import TinyOptions, build_tiny
from finetune.processes.command import run_command


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=usage_name(TINY),
        description="Write a tiny random model with its tokenizer, to rehearse a run, test or measure.",
    )
    parser.add_argument("family", help=f"one of: {', '.join(sorted(families()))}")
    parser.add_argument("out_dir", type=Path, help="folder to create")
    parser.add_argument(
        "--corpus", type=Path, help="text or JSON-lines file for the tokenizer (the sample data)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="ready vocabulary of the family's kind instead of training one"
    )
    sizes = {
        "hidden_size": "width of the model",
        "intermediate_size": "inner width of the feed-forward layers (8/3 of the width)",
        "num_layers": "number of layers",
        "num_heads": "number of attention heads",
        "num_key_value_heads": "number of key and value heads (as many as heads)",
        "vocab_size": "pieces of the trained tokenizer",
        "max_length": "longest sequence in tokens",
        "seed": "seed of the weights",
    }
    for name, help_text in sizes.items():
        default = getattr(TinyOptions, name)
        shown = "" if default is None else f" (default {default})"
        parser.add_argument(f"--{name}", type=int, default=default, help=help_text + shown)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
        UserError: A size, the family, or a file cannot be used.
    """
    arguments = vars(_parser().parse_args(argv))
    family, out_dir = arguments.pop("family"), arguments.pop("out_dir")
    folder = build_tiny(family, out_dir, **arguments)
    num_bytes = (folder / "model.safetensors").stat().st_size
    print(f"{folder}: tiny {family}, {num_bytes / 1e6:.1f} MB of random weights")


if __name__ == "__main__":
    sys.exit(run_command(main))
