"""Command line of export_model.py, checked without importing Paddle."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.adapters.adapter_folder import find_adapter_faults
from finetune.errors import UserError
from finetune.machine.command_names import EXPORT, usage_name
from finetune.machine.command_parser import CommandParser
from finetune.machine.device import detect_device, device_kind, find_device_fault
from finetune.models.hubs.adapters import is_hub_name, local_adapter
from finetune.storage.lock import remove_dead_lock

QUANTISED = ("int8", "int4", "nf4")
_USUAL_GROUPS = {"int4": 128}
_SMALLEST_GROUP = 16
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export and where to.

    Attributes:
        model_name_or_path: Folder or hub name of the model.
        output_path: Folder to make.
        dtype: Type of the exported weights.
        device: Where the graph is built.
        lora_path: Adapter to merge into the weights.
        prefix_path: Trained prefix to put in front of the cache.
        quantize: Form that linear layers are quantised to; None leaves them as they are.
        quantize_group_size: Columns that share a scale, -1: all of a row; None: what is usual for the form.
        calibration_data: Texts that integers are fitted to by GPTQ; None rounds to the nearest.
        perplexity_data: Texts that perplexity is measured on before and after; None: the last fifth of
            `calibration_data`, which is not fitted to then.
        chat_template: How those texts are written; None asks the folder of the adapter or the model.
        max_length: Most tokens of a text.
    """

    model_name_or_path: str
    output_path: Path
    dtype: str = "float32"
    device: str = "cpu"
    lora_path: Path | None = None
    prefix_path: Path | None = None
    quantize: str | None = None
    quantize_group_size: int | None = None
    calibration_data: Path | None = None
    perplexity_data: Path | None = None
    chat_template: str | None = None
    max_length: int = 512

    @property
    def group_size(self) -> int:
        """Columns that share a scale in the integers of a row; -1: all of them."""
        if self.quantize_group_size is not None:
            return self.quantize_group_size
        return _USUAL_GROUPS.get(self.quantize or "", -1)

    def check(self) -> None:
        """Says what is wrong before anything is read.

        Raises:
            UserError: Options that contradict each other, or an output folder that is not empty.
        """
        faults = []
        if self.lora_path and self.prefix_path:
            faults.append(
                "lora_path and prefix_path are both given, but a run trains one of them: leave one out"
            )
        for name in ("lora_path", "prefix_path"):
            if (folder := getattr(self, name)) and not is_hub_name(folder):
                faults += find_adapter_faults(name, folder)
        if fault := find_device_fault(self.device):
            faults.append(fault)
        if device_kind(self.device) == "cpu" and self.dtype != "float32":
            faults.append(
                f"dtype is {self.dtype}, which Paddle computes on GPU only: set --dtype float32, or --device gpu"
            )
        faults += self._quantize_faults()
        if fault := _output_fault(self.output_path):
            faults.append(fault)
        if faults:
            raise UserError(faults)

    def with_local_adapter(self) -> ExportOptions:
        """The same with the folder of an adapter that was given by its name on a hub.

        Raises:
            UserError: No hub has it, or it is no adapter.
        """
        local: dict[str, Any] = {}
        for name in ("lora_path", "prefix_path"):
            if (path := getattr(self, name)) and is_hub_name(path):
                local[name] = folder = local_adapter(path, name)
                if faults := find_adapter_faults(name, folder):
                    raise UserError(faults)
        return replace(self, **local)

    def _quantize_faults(self) -> Iterator[str]:
        names = ("quantize_group_size", "calibration_data", "perplexity_data")
        if self.quantize is None:
            for name in names:
                if getattr(self, name) is not None:
                    yield f"{name} is given without quantize: add --quantize {' or '.join(QUANTISED)}, or leave it out"
            return
        if self.dtype != "float32":
            yield f"quantize is {self.quantize} and dtype {self.dtype}: a quantised graph computes in float32, leave --dtype out"
        if self.prefix_path:
            yield (
                f"quantize is {self.quantize} and prefix_path is given: a quantised folder answers with its weights alone. "
                "Leave one out"
            )
        size = self.quantize_group_size
        if self.quantize == "nf4" and (size is not None or self.calibration_data):
            given = "quantize_group_size" if size is not None else "calibration_data"
            yield (
                f"quantize is nf4, which has blocks of 64 and rounds to the nearest: leave --{given} out"
                f"{'' if size is not None else ', or give it as --perplexity_data to measure only'}"
            )
        elif size is not None and size != -1 and (size < _SMALLEST_GROUP or size & (size - 1)):
            yield f"quantize_group_size is {size}: give -1 or a power of 2 from {_SMALLEST_GROUP} on"
        if self.max_length < 2:
            yield f"max_length is {self.max_length}: give at least 2"
        for name in names[1:]:
            if (path := getattr(self, name)) and not path.exists():
                yield f"{name} {path} does not exist: give a file or folder of texts"


def parse_options(argv: Sequence[str] | None = None) -> ExportOptions:
    """Reads the command line; exits with 2 and the usage where it cannot be read."""
    parser = CommandParser(
        prog=usage_name(EXPORT),
        description="Write a model as a static graph with its tokenizer, for predict_generation.py --mode static.",
    )
    parser.add_argument("--model_name_or_path", required=True, help="model folder, or name on the hub")
    parser.add_argument("--output_path", required=True, type=Path, help="folder to make; must not hold files")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="type of the weights; CPU runs float32 only (float32)",
    )
    parser.add_argument("--device", help="cpu or gpu, where the graph is built (gpu where Paddle sees one)")
    parser.add_argument(
        "--lora_path", type=Path, help="LoRA adapter to merge into the weights: folder, or name on a hub"
    )
    parser.add_argument("--prefix_path", type=Path, help="trained prefix, exported as the start of the cache")
    _add_quantize_options(parser)
    values = vars(parser.parse_args(argv))
    return ExportOptions(**values | {"device": detect_device(values["device"])})


def _add_quantize_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "quantisation",
        "The folder then holds the quantised weights too: predict_generation.py runs it with --mode dynamic as well, and "
        "it can be the base of a LoRA.",
    )
    group.add_argument("--quantize", choices=QUANTISED, help="form of the weights of linear layers (none)")
    group.add_argument(
        "--quantize_group_size",
        type=int,
        help="inputs that share a scale; -1: one scale for each output (int8 -1, int4 128)",
    )
    group.add_argument(
        "--calibration_data", type=Path, help="texts for GPTQ, as for training; none: to the nearest"
    )
    group.add_argument(
        "--perplexity_data",
        type=Path,
        help="texts to measure on before and after (the last fifth of calibration_data)",
    )
    group.add_argument("--chat_template", help="how texts are written (as in training)")
    group.add_argument("--max_length", type=int, default=512, help="most tokens of a text (512)")


def _output_fault(folder: Path) -> str | None:
    remove_dead_lock(folder)
    if folder.exists() and not folder.is_dir():
        return f"output_path {folder} is a file: give a folder that does not exist yet"
    if folder.is_dir() and any(folder.iterdir()):
        return f"output_path {folder} is not empty: give a folder that does not exist yet, or empty this one"
    return None
