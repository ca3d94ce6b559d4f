"""Computes the gradients of the compared first steps on PyTorch, in float32 on CPU.

python -m tests.reference.transformers_gradients      # adds to golden_gradients.json what it lacks
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.numpy import load_file

from tests.reference import chatglm2_qwen_training, transformers_training
from tests.reference.chatglm2_qwen_published import published_name
from tests.reference.gradients import CASES, GOLDEN_GRADIENTS, GradientCase, Gradients, summarise
from tests.reference.transformers_training import REFERENCES, batches, label_loss


def reference_gradients(name: str) -> Gradients:
    """The gradients of a case, by the names and in the layout of the tiny checkpoint or the adapter."""
    torch.manual_seed(0)
    case = CASES[name]
    with tempfile.TemporaryDirectory() as place:
        model, adapter = case.build(Path(place))
        compute = _of_written_model if case.is_written else _of_transformers
        return compute(case, model, adapter)


def _of_transformers(case: GradientCase, folder: Path, adapter: Path | None) -> Gradients:
    reference = REFERENCES[case.family]
    model = transformers_training.load_reference_model(folder, case.family)
    if adapter:
        model = transformers_training.add_reference_lora(model, adapter, family=case.family)
    _back_propagate(model, transformers_training.read_samples(folder, case.family), case)
    parameters, found = dict(model.named_parameters()), {}
    for name in load_file(_trained_file(folder, adapter)):
        if adapter:
            layer, _, part = f"base_model.model.{reference.rename(name)}".rpartition(".")
            parameter, turned = parameters[f"{layer}.{part}.default.weight"], True
        else:
            parameter = parameters[reference.rename(name)]
            turned = parameter.ndim == 2 and "embed" not in name and reference.turned
        # PyTorch has none for an expert without tokens; it is zero.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = gradient.numpy().T if turned else gradient.numpy()
    assert len(found) == sum(each.requires_grad for each in parameters.values())
    return found


def _of_written_model(case: GradientCase, folder: Path, adapter: Path | None) -> Gradients:
    model = chatglm2_qwen_training.ReferenceModel(folder, case.family, adapter)
    _back_propagate(model, chatglm2_qwen_training.read_samples(folder, case.family), case)
    trained, found = dict(model.named_parameters()), {}
    for name, array in load_file(_trained_file(folder, adapter)).items():
        gradient = trained[published_name(name, case.family)].grad.numpy()
        turned = adapter is None and array.ndim == 2 and not any(word in name for word in ("embed", "wte"))
        found[name] = gradient.T if turned else gradient
    assert len(found) == len(trained)
    return found


def _trained_file(folder: Path, adapter: Path | None) -> Path:
    return adapter / "weights.safetensors" if adapter else folder / "model.safetensors"


def _back_propagate(model: Any, samples: list, case: GradientCase) -> None:
    model.train()
    label_loss(model, next(batches(samples, case.settings))).backward()


def main() -> int:
    """Writes the golden values that are compared with where PyTorch is not installed; those that are there stay."""
    golden = json.loads(GOLDEN_GRADIENTS.read_text()) if GOLDEN_GRADIENTS.exists() else {"gradients": {}}
    golden["made_with"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in CASES:
        if name not in golden["gradients"]:
            found = reference_gradients(name)
            golden["gradients"][name] = {
                tensor: [float(f"{value:.8g}") for value in summarise(tensor, array)]
                for tensor, array in found.items()
            }
    GOLDEN_GRADIENTS.write_text(json.dumps(golden).replace("}, ", "},\n") + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
