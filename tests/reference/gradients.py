"""Gradients tensor by tensor: the runs that are compared, what is kept of each gradient, how far two are apart.

A case is the first step of full fine-tuning or LoRA of a family, from weights so large that attention looks at some
tokens more than at others. A golden file with all elements would be larger than the project. What is kept of a gradient: its length, its largest
element, and sums of its elements with signs drawn from the tensor's name. Errors of at most e in each of n elements
move such a sum by about sqrt(n) x e, whichever elements they are in: so sums are compared in units of sqrt(n) times
the largest element.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.reference import chatglm2_qwen_curves, curves
from tests.reference.chatglm2_qwen_published import PUBLISHED

GOLDEN_GRADIENTS = Path(__file__).resolve().parent / "golden_gradients.json"
NUM_SUMS = 3
TOLERANCE = 1e-5
"""Largest difference of a gradient's element, relative to the tensor's largest."""
ROUNDING = 1e-6
"""Gradients below this share of the model's largest element are zero but for rounding, such as those of biases of keys,
which move all scores of a query alike."""

WEIGHT_SCALE = 4.0
UPDATE_SCALE = 0.2
"""Of the adapters' second matrices. With those of the compared curves the gradients hang on the last bits of the
weights: PyTorch's own move by 2e-5 when these do."""

Gradients = dict[str, np.ndarray]


@dataclass(frozen=True)
class GradientCase:
    """The first step of a training."""

    family: str
    lora: bool
    shape: dict[str, int] | None = None

    @property
    def is_written(self) -> bool:
        """Whether the reference is written here, because transformers has none."""
        return self.family in PUBLISHED

    @property
    def settings(self) -> dict[str, Any]:
        """What the run is asked, but for its folders."""
        lora = {"lora": True, "lora_rank": curves.LORA_RANK} if self.lora else {}
        return curves.COMMON | lora | {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-3}

    def build(self, folder: Path) -> tuple[Path, Path | None]:
        """Writes the model and, for LoRA, the adapter that training starts from; their folders."""
        parts = chatglm2_qwen_curves if self.is_written else curves
        more = () if self.shape is None else (self.shape,)
        model = parts.build_model(folder / "model", self.family, *more)
        if not self.is_written:  # the others are scaled already
            _scale(
                model / "model.safetensors",
                WEIGHT_SCALE,
                of=lambda name: "norm" not in name and "ln_" not in name,
            )
        if not self.lora:
            return model, None
        adapter = parts.build_adapter(folder / "adapter", model, family=self.family)
        _scale(adapter / "weights.safetensors", UPDATE_SCALE, of=lambda name: name.endswith("lora_B"))
        return model, adapter


CASES = {
    f"{family}_{'lora' if lora else 'sft'}": GradientCase(family, lora)
    for family in (*curves.FAMILY_SHAPES, *PUBLISHED)
    for lora in (False, True)
} | {
    f"falcon_rw_{method}": GradientCase("falcon", method == "lora", curves.WHOLE_HEADS)
    for method in ("sft", "lora")
}


def _scale(path: Path, factor: float, *, of: Any) -> None:
    tensors = load_file(path)
    scaled = {name: array * np.float32(factor) if of(name) else array for name, array in tensors.items()}
    save_file(scaled, path, metadata={"format": "np"})


def summarise(name: str, gradient: np.ndarray) -> list[float]:
    """Length, largest absolute element, and `NUM_SUMS` sums with random signs; float64.

    Args:
        name: Of the tensor; decides the signs.
        gradient: In the project's layout, of any shape.
    """
    flat = gradient.astype(np.float64).ravel()
    random = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    signs = 2.0 * random.integers(0, 2, (NUM_SUMS, flat.size)) - 1.0  # [sums, elements]
    return [float(np.linalg.norm(flat)), float(np.abs(flat).max()), *(signs @ flat).tolist()]


def distances_from_summaries(found: Gradients, expected: dict[str, list[float]]) -> dict[str, float]:
    """About what `distances` gives, from what is kept of the expected gradients."""
    differences = {}
    for name, kept in expected.items():
        length, largest, *sums = (abs(a - b) for a, b in zip(summarise(name, found[name]), kept, strict=True))
        differences[name] = max(largest, max(length, *sums) / math.sqrt(found[name].size))
    return _relative(found, differences, {name: largest for name, (_, largest, *_) in expected.items()})


def distances(found: Gradients, expected: Gradients) -> dict[str, float]:
    """Of each tensor the largest difference of an element, relative to the tensor's largest element."""
    differences = {name: float(np.abs(found[name] - array).max()) for name, array in expected.items()}
    return _relative(
        found, differences, {name: float(np.abs(array).max()) for name, array in expected.items()}
    )


def _relative(found: Gradients, differences: dict[str, float], largest: dict[str, float]) -> dict[str, float]:
    assert found.keys() == differences.keys()
    nothing = ROUNDING * max(largest.values())

    def relative(name: str) -> float:
        if largest[name] > nothing:
            return differences[name] / largest[name]
        return 0.0 if np.abs(found[name]).max() <= nothing else math.inf

    return {name: relative(name) for name in differences}


def our_gradients(case: GradientCase, folder: Path) -> Gradients:
    """The gradients of the case's step through the entry script, by the names of the checkpoint or adapter."""
    from tests.conftest import run_entry, write_arguments

    model, adapter = case.build(folder)
    places = {
        "model_name_or_path": str(model),
        "dataset_name_or_path": str(curves.HERE / "data"),
        "output_dir": str(folder / "out"),
    }
    if adapter:
        places["lora_path"] = str(adapter)
    with first_gradients() as found:
        assert run_entry(write_arguments(folder / "arguments.json", **case.settings, **places)) == 0
    if adapter:
        return {name.removeprefix("model."): array for name, array in found.items()}
    # A matrix that is embedding and output layer has the name of the first in files, of either in a model.
    (embedding,) = load_file(model / "model.safetensors").keys() - found.keys() or {"lm_head.weight"}
    return {embedding if name == "lm_head.weight" else name: array for name, array in found.items()}


@contextmanager
def first_gradients() -> Iterator[Gradients]:
    """Within the block, what a run's first step has as gradients before they are clipped, by checkpoint names."""
    from finetune.training import optimizer_step

    found: Gradients = {}
    end_step = optimizer_step.end_step

    def keep(parallel, *arguments, **more):
        ended = end_step(parallel, *arguments, **more)
        if not found:
            found.update(
                {
                    name: parameter.grad.numpy()
                    for name, parameter in parallel.model.named_parameters()
                    if parameter.grad is not None
                }
            )
        return ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_step, "end_step", keep)
        yield found
