"""Optimizer and learning-rate state as plain files, named after the model's parameters.

Paddle keys its accumulators by generated names (`linear_7.w_0_moment1_0`) that change
from run to run; a file keeps `<parameter>/<accumulator>` instead, the naming of
PaddleNLP's unified checkpoints. Whatever the layout of the run, the files hold whole tensors under
the names of one process: `optimizer.safetensors`, or several files with an index when the stages of
a pipeline wrote one each. A rank reads its own parts only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from finetune.files import write_json
from finetune.models.parameters import release_pages
from finetune.models.shard_files import open_shards
from finetune.models.tensor_splits import is_scalar, tensor_of
from finetune.parallel.groups import ProcessGroups
from finetune.parallel.saving import (
    LocalTensor,
    family_of,
    find_local_split,
    save_shards,
    save_tensors_of_all,
)
from finetune.storage.checkpoints import ShardedCheckpoint, TensorFiles, open_indexed
from finetune.storage.dtypes import dtype_name, to_tensor

OPTIMIZER_STEM = "optimizer"
OPTIMIZER_FILE = f"{OPTIMIZER_STEM}.safetensors"
OPTIMIZER_INDEX = f"{OPTIMIZER_FILE}.index.json"
SHARD_ENDING = ".pdopt"
SCHEDULER_FILE = "scheduler.json"
_MASTER = "master_weight"


class SlicedState(Protocol):
    """What is asked of `finetune.parallel.replicas.Replicas`."""

    def tensor_names(self) -> dict[str, str]:
        """Generated name of each tensor that the optimizer updates -> structured name of the parameter."""

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a trained parameter."""

    def slice_of(self, name: str, whole: Any) -> Any:
        """What this rank updates out of a tensor that has a parameter's shape."""

    def whole_of(self, name: str, part: Any) -> Any:
        """The whole tensor of which the ranks of the sharding group hold slices; all must call it."""


class _WholeState:
    """Optimizer state of a process that updates whole parameters."""

    def __init__(self, model: Any):
        self._trained = {name: each for name, each in model.named_parameters() if not each.stop_gradient}

    def tensor_names(self) -> dict[str, str]:
        return {tensor.name: name for name, tensor in self._trained.items()}

    def whole_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._trained[name].shape)

    def slice_of(self, name: str, whole: Any) -> Any:
        return whole

    def whole_of(self, name: str, part: Any) -> Any:
        return part


def save_optimizer(
    folder: Path,
    model: Any,
    optimizer: Any,
    groups: ProcessGroups | None = None,
    *,
    replicas: SlicedState | None = None,
    unified: bool = True,
) -> None:
    """Writes moments, their powers and float32 master weights of every trained parameter.

    Args:
        folder: Where to write.
        model: The model, or the stage of it, with its adapter if it has one.
        optimizer: Of its parameters, or of this rank's slices of them.
        groups: All ranks call this; None for one process.
        replicas: Knows the slices of sharding; None where every rank updates whole parameters.
        unified: Whether files hold whole tensors; otherwise one `optimizer.tpXX_ppYY.pdopt` for each rank.
    """
    groups = groups or ProcessGroups()
    tensors = _local_state(model, optimizer, replicas or _WholeState(model))
    if unified:
        save_tensors_of_all(tensors, folder, groups, stem=OPTIMIZER_STEM)
    else:
        save_shards(tensors, folder, groups, stem=OPTIMIZER_STEM, ending=SHARD_ENDING)


def _local_state(model: Any, optimizer: Any, replicas: SlicedState) -> dict[str, LocalTensor]:
    """This rank's state by the names in the files."""
    state = optimizer.state_dict()
    masters = state.pop("master_weights", {})
    state.pop("LR_Scheduler", None)
    found: dict[str, Any] = {}
    # Longest generated name first: `linear_1.w_0` must not claim what belongs to `linear_1.w_0_x`.
    for generated, name in sorted(replicas.tensor_names().items(), key=lambda item: -len(item[0])):
        for key in [key for key in state if key.startswith(generated + "_")]:
            found[f"{name}/{key[len(generated) + 1 :]}"] = state.pop(key)
        if generated in masters:
            found[f"{name}/{_MASTER}"] = masters[generated]
    if state:
        raise RuntimeError(f"optimizer state that belongs to no parameter: {sorted(state)[:5]}")
    config = _config(model)
    family = family_of(config) if config is not None else None
    return {
        key: LocalTensor(
            shape=tuple(tensor.shape) if is_scalar(key) else replicas.whole_shape(tensor_of(key)),
            dtype=dtype_name(tensor.dtype),
            read=_reader(replicas, key, tensor),
            split=find_local_split(key, config, family) if config is not None else None,
        )
        for key, tensor in sorted(found.items())
    }


def _reader(replicas: SlicedState, key: str, tensor: Any) -> Callable[[], Any]:
    if is_scalar(key):
        return lambda: tensor
    return lambda: replicas.whole_of(tensor_of(key), tensor)


def load_optimizer(folder: Path, model: Any, optimizer: Any, *, replicas: SlicedState | None = None) -> None:
    """Gives an optimizer of the same parameters the state that was saved, under whatever layout.

    Args:
        folder: Where `save_optimizer` wrote.
        model: The model or stage; its config says which tensor-parallel rank this is.
        optimizer: Of its parameters, or of this rank's slices of them.
        replicas: As for `save_optimizer`.

    Raises:
        RuntimeError: The file holds state for parameters that this model does not train.
        UserError: A file is missing or damaged.
    """
    replicas = replicas or _WholeState(model)
    config = _config(model)
    family = family_of(config) if config is not None else None
    generated = {name: key for key, name in replicas.tensor_names().items()}
    files = _open_state(folder, family, config)
    state: dict[str, Any] = {}
    masters: dict[str, Any] = {}
    unknown = set()
    for key in files.names:
        name, _, accumulator = key.rpartition("/")
        if name not in generated:
            unknown.add(name)
            continue
        array = files.read(key)
        if split := find_local_split(key, config, family) if config is not None else None:
            array = split.part(array, config.tensor_parallel_degree, config.tensor_parallel_rank)
        tensor = to_tensor(np.array(array))
        release_pages(array)
        if not is_scalar(key):
            tensor = replicas.slice_of(name, tensor)
        if accumulator == _MASTER:
            masters[generated[name]] = tensor
        else:
            tensor.name = f"{generated[name]}_{accumulator}"
            state[tensor.name] = tensor
    # What a stage of a pipeline does not know belongs to another.
    if unknown and getattr(config, "local_layers", None) is None:
        raise RuntimeError(f"{folder} has optimizer state for unknown parameters: {sorted(unknown)[:5]}")
    if masters:
        state["master_weights"] = masters
    optimizer.set_state_dict(state)


def _open_state(folder: Path, family: Any, config: Any) -> TensorFiles | ShardedCheckpoint:
    if (folder / OPTIMIZER_INDEX).is_file():
        return open_indexed(folder, OPTIMIZER_INDEX)
    if (folder / OPTIMIZER_FILE).is_file() or family is None:
        return TensorFiles([folder / OPTIMIZER_FILE])
    return open_shards(folder, stem=OPTIMIZER_STEM, ending=SHARD_ENDING, family=family, config=config)


def _config(model: Any) -> Any:
    """The PaddleNLP config of the model or of an adapter's base; None for other layers."""
    config = getattr(getattr(model, "model", model), "config", None)
    return config if hasattr(config, "tensor_parallel_degree") else None


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
    # The next update takes the rate that was worked out before the save, of a schedule that may have been shorter.
    scheduler.last_lr = scheduler.get_lr()
    if scaler is not None and "scaler" in state:
        saved = dict(state["scaler"])
        if isinstance(saved.get("scale"), list):
            saved["scale"] = np.asarray(saved["scale"], dtype="float32")
        scaler.load_state_dict(saved)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
