"""Writes a model as one GGUF file for llama.cpp and Ollama.

python -m finetune.serving.gguf --model_name_or_path ./merged --output_path ./gguf --type q8_0
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.machine.command_names import called_as
from finetune.machine.command_parser import CommandParser
from finetune.machine.command_start import start_command
from finetune.machine.screen import print_text

if __name__ == "__main__":  # until `run_command`: the imports below take a moment
    start_command()

from finetune.errors import UserError
from finetune.merge.option_types import add_switch
from finetune.processes.command import run_command
from finetune.serving.gguf.run import MODELFILE, WEIGHTS, export_gguf
from finetune.serving.gguf.tensors import TYPES


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=f"{program} gguf" if (program := called_as()) else "python -m finetune.serving.gguf",
        description=f"Write a whole (merged) model as {WEIGHTS} for llama.cpp, with a {MODELFILE} for Ollama.",
    )
    parser.add_argument("--model_name_or_path", required=True, help="folder or hub name of the model")
    parser.add_argument("--output_path", required=True, type=Path, help="folder to make")
    parser.add_argument(
        "--type",
        choices=tuple(TYPES),
        default="f16",
        help="element type of the matrices; vectors stay f32 (default: f16)",
    )
    add_switch(parser, "--overwrite", "replace the result of an earlier export")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Raises:
        UserError: The library is not installed, or the model cannot be written.
    """
    options = _parser().parse_args(argv)
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "the export to GGUF needs the package gguf, which is not installed: pip install '.[gguf]'"
        )
    facts = export_gguf(
        options.model_name_or_path, options.output_path, options.type, overwrite=options.overwrite
    )
    if facts.narrow:
        print_text(
            f"note: {len(facts.narrow)} matrices became f16: blocks of q8_0 need rows of a multiple of 32 numbers"
        )
    if facts.sizes.is_window:
        print_text(
            f"note: texts end at {facts.sizes.context} tokens, the model's window of attention, which llama.cpp "
            "leaves out"
        )
    print_text(
        f"{options.output_path / WEIGHTS}: {facts.architecture}, {options.type}, {facts.num_tensors} tensors, "
        f"{facts.num_bytes / 1e6:.1f} MB, texts of up to {facts.sizes.context} tokens; read back and compared"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
