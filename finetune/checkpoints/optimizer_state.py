"""Optimizer and learning-rate state as plain files, named after the model's parameters.

Paddle keys its accumulators by generated names (`linear_7.w_0_moment1_0`) that change
from run to run; a file keeps `<parameter>/<accumulator>` instead, the naming of
PaddleNLP's unified checkpoints. Whatever the layout of the run, the files hold whole tensors under
the names of one process: `optimizer.safetensors`, or several files with an index when the stages of
a pipeline wrote one each. A rank reads its own parts only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from finetune.checkpoints.folder import lacks_moments
from finetune.checkpoints.tensors_of_ranks import (
    LocalTensor,
    family_of,
    find_local_split,
)
from finetune.checkpoints.writers import TensorSet, TensorSetWriter
from finetune.errors import UserError
from finetune.families.tensor_splits import is_scalar
from finetune.models.parameters import release_pages
from finetune.storage.checkpoints import ShardedCheckpoint, TensorFiles, open_indexed
from finetune.storage.dtypes import Array, to_tensor

OPTIMIZER_FILES = TensorSet("optimizer", "optimizer", ".pdopt")
PADDLENLP_MASTERS_INDEX = "master_weights.safetensors.index.json"
"""PaddleNLP's unified checkpoints keep master weights apart."""
NO_MASTERS = (
    "was trained with float32 weights and holds no master weights, so fp16_opt_level O2 cannot continue it exactly: "
    "continue with fp16_opt_level O1 or in float32, or begin a new run with model_name_or_path (or lora_path, "
    "prefix_path) set to it"
)
_MASTER = "master_weight"
_NUMBER = "_0"
"""Ends the name of each accumulator in Paddle and in the files; Paddle counts on where a process makes a second one."""


class SlicedState(Protocol):
    """What is asked of `finetune.parallel.sharding.replicas.Replicas`."""

    @property
    def trained(self) -> Mapping[str, Any]:
        """Trained parameters by structured name."""

    def tensor_names(self) -> dict[str, str]:
        """Generated name of each tensor that this rank's optimizer updates -> structured name of the parameter."""

    def collect_state(self, state: Mapping[str, Any]) -> Mapping[str, WholeState]:
        """State of all ranks of the sharding group from what this one keeps, by the names in the files."""

    def slice_of(self, name: str, whole: Any) -> Any:
        """What this rank updates out of a tensor that has a parameter's shape."""

    def share_updated(self) -> None:
        """Takes what ranks changed in what they update over into the parameters."""


class WholeState(Protocol):
    """What is asked of `finetune.parallel.sharding.whole_state.StateTensor`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    @property
    def dtype(self) -> str:
        """Paddle's name of its type."""

    @property
    def read(self) -> Callable[[], Any]:
        """Gives it to the first rank of the sharding group; all must call it."""


def save_optimizer(
    folder: Path,
    model: Any,
    optimizer: Any,
    writer: TensorSetWriter,
    *,
    replicas: SlicedState,
    with_moments: bool = True,
) -> None:
    """Writes moments, their powers and float32 master weights of every trained parameter.

    Args:
        folder: Where to write.
        model: The model, or the stage of it, with its adapter if it has one.
        optimizer: Of its parameters, or of this rank's slices of them.
        writer: How state becomes files; all ranks call this.
        replicas: Knows what this rank updates: parameters, or slices of them.
        with_moments: False leaves master weights alone, which are the weights of a run in half precision; a run in
            float32 has none, and no file is written.
    """
    tensors = _local_state(model, optimizer, replicas)
    if not with_moments:
        tensors = {key: tensor for key, tensor in tensors.items() if key.endswith(f"/{_MASTER}")}
        if not any(writer.groups.world.gather_objects(bool(tensors))):
            return
    writer.write(tensors, folder, OPTIMIZER_FILES)


def _local_state(model: Any, optimizer: Any, replicas: SlicedState) -> dict[str, LocalTensor]:
    """This rank's state by the names in the files."""
    config = _config(model)
    family = family_of(config) if config is not None else None
    state = replicas.collect_state(_named_state(optimizer, replicas.tensor_names()))
    return {
        key: LocalTensor(
            shape=tensor.shape,
            dtype=tensor.dtype,
            read=tensor.read,
            split=find_local_split(key, config, family) if config is not None else None,
        )
        for key, tensor in sorted(state.items())
    }


def _named_state(optimizer: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Everything that an optimizer keeps, by `<parameter>/<accumulator>_0` and `<parameter>/master_weight`.

    Paddle keys the accumulators of a half-precision parameter by the name of its float32 master weight.

    Args:
        optimizer: One of `paddle.optimizer`.
        names: Paddle's name of each updated tensor -> the parameter's.
    """
    masters = optimizer._master_weights
    holders = dict(names) | {masters[key].name: name for key, name in names.items() if key in masters}
    found = {f"{names[key]}/{_MASTER}": master for key, master in masters.items() if key in names}
    unknown = []
    for accumulator, tensors in optimizer._accumulators.items():
        for holder, tensor in tensors.items():
            if holder in holders:
                found[f"{holders[holder]}/{accumulator}{_NUMBER}"] = tensor
            else:
                unknown.append(tensor.name)
    if unknown:
        raise RuntimeError(f"optimizer state that belongs to no parameter: {sorted(unknown)[:5]}")
    return found


def load_optimizer(
    folder: Path,
    model: Any,
    optimizer: Any,
    *,
    replicas: SlicedState,
    is_stage: bool = False,
) -> None:
    """Gives an optimizer of the same parameters the state that was saved, under whatever layout.

    Moments that a checkpoint leaves out by choice start anew, as in a first step. Master weights are taken up by parameters that have none, too: a run in half precision continues in float32
    from the float32 values.

    Args:
        folder: Where `save_optimizer` wrote.
        model: The model or stage; its config says which tensor-parallel rank this is.
        optimizer: Of its parameters, or of this rank's slices of them; it has not made a step yet.
        replicas: As for `save_optimizer`.
        is_stage: Whether the model is a stage of a pipeline, which knows a part of the parameters only.

    Raises:
        RuntimeError: The file holds state for parameters that this model does not train.
        UserError: A file is missing or damaged, or has no master weights for parameters in half precision.
    """
    config = _config(model)
    family = family_of(config) if config is not None else None
    names = replicas.tensor_names()
    parameters = {names[each.name]: each for each in optimizer._parameter_list if each.name in names}
    if not OPTIMIZER_FILES.is_in(folder) and lacks_moments(folder):
        _create_state(optimizer, list(parameters.values()))
        _check_masters(folder, optimizer, parameters, set())
        return
    files = _open_state(folder, family, config)
    keys = {key: key.rpartition("/")[0] for key in files.names}
    unknown = set(keys.values()) - replicas.trained.keys()
    if unknown and not is_stage:
        raise RuntimeError(f"{folder} has optimizer state for unknown parameters: {sorted(unknown)[:5]}")
    known = set(keys.values()) & parameters.keys()
    _create_state(optimizer, [parameters[name] for name in sorted(known)])
    _check_masters(folder, optimizer, {name: parameters[name] for name in known}, set(keys))
    state = _named_state(optimizer, names)
    for key in (key for key, name in keys.items() if name in known):
        array = files.read(key)
        if split := find_local_split(key, config, family) if config is not None else None:
            array = split.part(array, config.tensor_parallel_degree, config.tensor_parallel_rank)
        tensor = to_tensor(np.array(array))
        release_pages(array)
        if not is_scalar(key):
            tensor = replicas.slice_of(keys[key], tensor)
        target = state.get(key)
        if target is None and key.endswith(f"/{_MASTER}"):
            target = parameters[keys[key]]  # in float32
        if target is None:
            raise UserError(
                f"{folder} holds {key}, which the optimizer of this run does not keep: continue with the same optim"
            )
        target.set_value(tensor.astype(target.dtype))
    if any(key.endswith(f"/{_MASTER}") for key in keys):
        replicas.share_updated()


def _create_state(optimizer: Any, parameters: list[Any]) -> None:
    """Has an optimizer make its accumulators and master weights now instead of in its first step."""
    from paddle.base import framework

    optimizer._create_accumulators(framework.default_main_program().global_block(), parameters)


def _check_masters(folder: Path, optimizer: Any, parameters: Mapping[str, Any], keys: set[str]) -> None:
    """Refuses to begin master weights from rounded ones."""
    masters = optimizer._master_weights
    missing = [
        name for name, each in parameters.items() if each.name in masters and f"{name}/{_MASTER}" not in keys
    ]
    if missing:
        raise UserError(f"{folder} {NO_MASTERS}")


def _open_state(folder: Path, family: Any, config: Any) -> TensorFiles | ShardedCheckpoint | _WithMasters:
    files = OPTIMIZER_FILES.open(folder, family, config)
    if (folder / PADDLENLP_MASTERS_INDEX).is_file():
        return _WithMasters(files, open_indexed(folder, PADDLENLP_MASTERS_INDEX))
    return files


def holds_master_weights(checkpoint: Path) -> bool | None:
    """Whether a checkpoint of half-precision weights has their float32 values; None where only Paddle could tell.

    Args:
        checkpoint: A checkpoint folder; names are read, no tensor.
    """
    if (checkpoint / PADDLENLP_MASTERS_INDEX).is_file():
        return True
    if not OPTIMIZER_FILES.is_in(checkpoint) and lacks_moments(checkpoint):
        return False
    if not OPTIMIZER_FILES.has_whole_tensors(checkpoint):
        return None
    return any(name.endswith(f"/{_MASTER}") for name in _open_state(checkpoint, None, None).names)


class _WithMasters:
    """Optimizer state whose master weights lie in files of their own, under the parameters' names."""

    def __init__(self, state: TensorFiles | ShardedCheckpoint, masters: TensorFiles):
        self._state, self._masters = state, masters
        self.names = state.names | {f"{name}/{_MASTER}": shape for name, shape in masters.names.items()}

    def read(self, key: str) -> Array:
        name, _, accumulator = key.rpartition("/")
        return self._masters.read(name) if accumulator == _MASTER else self._state.read(key)


def _config(model: Any) -> Any:
    """The PaddleNLP config of the model or of an adapter's base; None for other layers."""
    config = getattr(getattr(model, "model", model), "config", None)
    return config if hasattr(config, "tensor_parallel_degree") else None
