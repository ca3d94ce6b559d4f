"""The settings of a first run: what a shipped argument file says, fitted to model, data and machine.

Memory is estimated by the weights alone: W bytes for each weight and, of what is trained, 12 more for a gradient, two
moments and a float32 copy. LoRA trains so little that only W counts. Activations come on top, so an estimate over half
of the memory already takes the smallest batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.reading.marks import QUALITY_MARKS
from finetune.data.reading.preferences import is_preference
from finetune.data.reading.readers import read_file
from finetune.data.reading.records import FaultCollector
from finetune.data.reading.source import find_split
from finetune.machine.device import count_visible_gpus, detect_device, device_kind
from finetune.models.resolve import resolve_model
from finetune.storage.files import read_json_object
from finetune.storage.shipped_files import shipped_arguments

_DEGREES = (
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "pipeline_parallel_config",
    "sharding_parallel_degree",
)
_HALF = ("bf16", "fp16", "fp16_opt_level")
_TRAINED_BYTES = 12
_MAX_RECORDS_COUNTED = 10_000
_NUM_RECORDS_LOOKED_AT = 8
_HELD_BACK = 0.05


@dataclass
class FirstArguments:
    """Settings that are being put together.

    Attributes:
        values: By name, as an argument file has them.
        notes: What was seen and why something was chosen, a line each.
    """

    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DataFacts:
    """What the training data look like.

    Attributes:
        kind: "answers", "pairs" of a better and a worse answer, or "marked" answers (good or bad).
        num_records: Records of the first file, at most `_MAX_RECORDS_COUNTED`.
        has_dev: Whether there is a dev split.
    """

    kind: str
    num_records: int
    has_dev: bool

    def describe(self) -> str:
        """One line."""
        kinds = {
            "answers": "answers to learn",
            "pairs": "pairs of a better and a worse answer",
            "marked": "answers marked as good or bad",
        }
        number = f"{self.num_records:,}" + " and more" * (self.num_records == _MAX_RECORDS_COUNTED)
        return f"data: {number} records, {kinds[self.kind]}" + ("" if self.has_dev else ", no dev split")

    @property
    def method(self) -> str:
        """The method that such data are for."""
        return {"answers": "lora", "pairs": "dpo", "marked": "kto"}[self.kind]


def look_at_data(path: str) -> DataFacts:
    """Reads the first training file of a data set.

    Raises:
        UserError: There is none, or its first records cannot be read.
    """
    files = find_split(path, "train")
    faults = FaultCollector()
    records = itertools.islice(read_file(files[0], faults), _MAX_RECORDS_COUNTED)
    first = list(itertools.islice(records, _NUM_RECORDS_LOOKED_AT))
    names = {name for record in first for name in record.fields}
    num_records = len(first) + sum(1 for _ in records)
    faults.raise_if_any()
    kind = "pairs" if is_preference(names) else "marked" if names & QUALITY_MARKS else "answers"
    return DataFacts(kind, num_records, bool(find_split(path, "dev", required=False)))


def find_arguments(family: str, method: str) -> Path | None:
    """The shipped file of a method; that of another family where this one has none, since a family's facts are elsewhere."""
    shipped = shipped_arguments()
    return shipped.get(f"{family}/{method}") or next(
        (path for name, path in shipped.items() if name == f"llama/{method}"), None
    )


def read_shipped(path: Path) -> FirstArguments:
    """The settings of a shipped file."""
    return FirstArguments(
        {name: value for name, value in read_json_object(path).items() if name != "$schema"}
    )


def fit_to_data(first: FirstArguments, facts: DataFacts) -> None:
    """Holds a part of the data back where an evaluation has none of its own."""
    first.notes.append(facts.describe())
    if first.values.get("do_eval") and not facts.has_dev:
        first.values["validation_split"] = _HELD_BACK
        first.notes.append(f"validation_split {_HELD_BACK}: every twentieth record is kept for evaluation")


def fit_to_machine(first: FirstArguments, *, memory_bytes: int | None = None) -> None:
    """Takes out what this machine does not have, and chooses the batch by the memory.

    Args:
        first: Put in order in place.
        memory_bytes: Of one card, or of the machine where it has none; None takes the free memory of the machine,
            and on cards, whose memory is not known before Paddle is loaded, leaves the batch alone.
    """
    values = first.values
    on_cpu = device_kind(detect_device(values.get("device"))) == "cpu"
    num_devices = 1 if on_cpu else max(1, count_visible_gpus())
    wanted = values.get("tensor_parallel_degree", 1) * values.get("pipeline_parallel_degree", 1)
    if wanted > num_devices:
        for name in _DEGREES:
            values.pop(name, None)
        place = "the CPU" if on_cpu else f"{num_devices} card{'s' * (num_devices > 1)}"
        first.notes.append(f"one process instead of {wanted}: runs use {place}")
    if on_cpu and any([values.pop(name, None) for name in _HALF]):
        first.notes.append("float32 instead of bfloat16: runs use the CPU")
    if memory_bytes is None and on_cpu:
        import psutil

        memory_bytes = psutil.virtual_memory().available
    if memory_bytes is not None:
        _fit_batch(first, memory_bytes, weight_bytes=4 if on_cpu else 2)


def _fit_batch(first: FirstArguments, memory_bytes: int, *, weight_bytes: int) -> None:
    values = first.values
    num_weights = count_weights(str(values["model_name_or_path"]))
    if num_weights is None:
        return
    per_weight = (
        weight_bytes if values.get("lora") or values.get("prefix_tuning") else weight_bytes + _TRAINED_BYTES
    )
    needed = num_weights * per_weight
    shown = f"about {_gigabytes(needed)} without activations, {_gigabytes(memory_bytes)} at hand"
    first.notes.append(f"memory: {_millions(num_weights)} million weights, {shown}")
    if needed > memory_bytes:
        remedy = "choose a smaller model" if values.get("lora") else "choose lora, or a smaller model"
        first.notes.append(f"memory is not enough: {remedy}")
    elif needed > memory_bytes / 2:
        batch = values.get("per_device_train_batch_size", 1) * values.get("gradient_accumulation_steps", 1)
        values |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batch, "recompute": True}
        first.notes.append(f"one sample at a time, {batch} of them in a step: memory is short")


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.0f}" if number >= 1e8 else f"{number / 1e6:.3g}"


def count_weights(model: str) -> int | None:
    """Weights of a local model by the size of its files; None for a name on a hub, or where the type is not told."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    config = read_json_object(folder / "config.json")
    size = _bytes_of_type(config)
    files = [
        path
        for pattern in ("model*.safetensors", "model*.pdparams", "pytorch_model*.bin")
        for path in folder.glob(pattern)
    ]
    return sum(path.stat().st_size for path in files) // size if files else None


def _bytes_of_type(config: Mapping[str, Any]) -> int:
    return 4 if "32" in str(config.get("dtype") or config.get("torch_dtype") or "float32") else 2


class ModelFacts(NamedTuple):
    """What the settings depend on: the model's family, and whether more than text belongs to the model."""

    family: str
    is_multimodal: bool


def look_at_model(model: str) -> ModelFacts:
    """Reads the config.json of a model's folder or of its hub.

    Raises:
        UserError: There is no such model, or its family is not covered.
    """
    resolved = resolve_model(model, needs_weights=False)
    return ModelFacts(resolved.family.name, resolved.kind is not None)
