"""Optimizer and learning-rate state as plain files, named after the model's parameters.

Paddle keys its accumulators by generated names (`linear_7.w_0_moment1_0`) that change
from run to run; a file keeps `<parameter>/<accumulator>` instead, the naming of
PaddleNLP's unified checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.files import write_json
from finetune.training.tensor_files import load_tensors, save_tensors

if TYPE_CHECKING:
    import paddle

OPTIMIZER_FILE = "optimizer.safetensors"
SCHEDULER_FILE = "scheduler.json"
_MASTER = "master_weight"


def save_optimizer(folder: Path, model: Any, optimizer: Any) -> None:
    """Writes moments, their powers and float32 master weights of every trained parameter."""
    state = optimizer.state_dict()
    masters = state.pop("master_weights", {})
    state.pop("LR_Scheduler", None)
    tensors: dict[str, paddle.Tensor] = {}
    # Longest generated name first: `linear_1.w_0` must not claim what belongs to `linear_1.w_0_x`.
    for generated, name in sorted(_names(model).items(), key=lambda item: -len(item[0])):
        for key in [key for key in state if key.startswith(generated + "_")]:
            tensors[f"{name}/{key[len(generated) + 1 :]}"] = state.pop(key)
        if generated in masters:
            tensors[f"{name}/{_MASTER}"] = masters[generated]
    if state:
        raise RuntimeError(f"optimizer state that belongs to no parameter: {sorted(state)[:5]}")
    save_tensors(folder / OPTIMIZER_FILE, tensors)


def load_optimizer(folder: Path, model: Any, optimizer: Any) -> None:
    """Gives an optimizer of the same parameters the state it had when it was saved.

    Raises:
        RuntimeError: The file holds state for parameters that this model does not train.
    """
    generated = {name: key for key, name in _names(model).items()}
    state: dict[str, Any] = {}
    masters: dict[str, Any] = {}
    unknown = set()
    for key, tensor in load_tensors(folder / OPTIMIZER_FILE).items():
        name, _, accumulator = key.rpartition("/")
        if name not in generated:
            unknown.add(name)
        elif accumulator == _MASTER:
            masters[generated[name]] = tensor
        else:
            tensor.name = f"{generated[name]}_{accumulator}"
            state[tensor.name] = tensor
    if unknown:
        raise RuntimeError(
            f"{folder / OPTIMIZER_FILE} has state for unknown parameters: {sorted(unknown)[:5]}"
        )
    if masters:
        state["master_weights"] = masters
    optimizer.set_state_dict(state)


def _names(model: Any) -> dict[str, str]:
    """Generated tensor name to structured parameter name, for what is trained."""
    return {tensor.name: name for name, tensor in model.named_parameters() if not tensor.stop_gradient}


def save_scheduler(folder: Path, scheduler: Any, scaler: Any = None) -> None:
    """Writes the learning-rate scheduler's position and, in float16 runs, the loss scale."""
    state = {"scheduler": scheduler.state_dict()}
    if scaler is not None:
        state["scaler"] = {key: _plain(value) for key, value in scaler.state_dict().items()}
    write_json(folder / SCHEDULER_FILE, state)


def load_scheduler(folder: Path, scheduler: Any, scaler: Any = None) -> None:
    """Restores what `save_scheduler` wrote."""
    import numpy as np

    state = json.loads((folder / SCHEDULER_FILE).read_text(encoding="utf-8"))
    scheduler.set_state_dict(state["scheduler"])
    if scaler is not None and "scaler" in state:
        saved = dict(state["scaler"])
        if isinstance(saved.get("scale"), list):
            saved["scale"] = np.asarray(saved["scale"], dtype="float32")
        scaler.load_state_dict(saved)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
