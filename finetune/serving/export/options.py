"""Command line of export_model.py, checked without importing Paddle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.adapters.adapter_folder import find_adapter_faults
from finetune.errors import UserError
from finetune.machine.device import detect_device, device_kind, find_device_fault
from finetune.models.hubs.adapters import is_hub_name, local_adapter
from finetune.storage.lock import remove_dead_lock

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
    """

    model_name_or_path: str
    output_path: Path
    dtype: str = "float32"
    device: str = "cpu"
    lora_path: Path | None = None
    prefix_path: Path | None = None

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


def parse_options(argv: Sequence[str] | None = None) -> ExportOptions:
    """Reads the command line; exits with 2 and the usage where it cannot be read."""
    parser = argparse.ArgumentParser(
        prog="export_model.py",
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
    values = vars(parser.parse_args(argv))
    return ExportOptions(**values | {"device": detect_device(values["device"])})


def _output_fault(folder: Path) -> str | None:
    remove_dead_lock(folder)
    if folder.exists() and not folder.is_dir():
        return f"output_path {folder} is a file: give a folder that does not exist yet"
    if folder.is_dir() and any(folder.iterdir()):
        return f"output_path {folder} is not empty: give a folder that does not exist yet, or empty this one"
    return None
