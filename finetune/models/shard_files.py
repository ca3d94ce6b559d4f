"""Checkpoints in one file per tensor- and pipeline-parallel rank, read as one model. NumPy only.

    model_state.pdparams                one process
    model_state.tp00.pdparams ...       tensor parallelism
    model_state.pp00.pdparams ...       pipeline parallelism
    model_state.tp00_pp00.pdparams ...  both

Each file is a pickle of arrays by parameter name, as `paddle.save` and PaddleNLP write it. The files of the stages
hold different names, those of the tensor-parallel ranks of a stage the same names with different parts. The degrees
are found from the file names. Arrays stay in the files (see `pickled_arrays.py`) until a tensor is asked for; then its
parts are joined by the family's rules (`tensor_splits.py`), so that one tensor at a time is in memory.

`ShardedCheckpoint` has `names`, `format` and `read` as `weights.Checkpoint` has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.models.family import Family, find_family
from finetune.models.pickled_arrays import PickledArray, read_pdparams
from finetune.models.tensor_splits import Split, find_split

MODEL_STEM = "model_state"
LORA_STEM = "lora_model_state"
PREFIX_STEM = "prefix_model_state"


def shard_name(stem: str, *, tensor: int | None, pipeline: int | None, ending: str = ".pdparams") -> str:
    """File name of a rank's shard; None for an axis of degree 1."""
    places = ("tp", tensor), ("pp", pipeline)
    suffix = "_".join(f"{axis}{place:02d}" for axis, place in places if place is not None)
    return f"{stem}.{suffix}{ending}" if suffix else f"{stem}{ending}"


def find_shards(folder: Path, stem: str, ending: str = ".pdparams") -> dict[tuple[int, int], Path]:
    """The shards of a folder by (tensor, pipeline) rank; empty when there are none.

    A file without ranks in its name counts only where there is no other.

    Raises:
        UserError: A shard is missing; the message names it.
    """
    pattern = re.compile(rf"{re.escape(stem)}\.(?:tp(?P<tp>\d+))?_?(?:pp(?P<pp>\d+))?{re.escape(ending)}")
    matches = [(match, path) for path in folder.glob(f"{stem}.*") if (match := pattern.fullmatch(path.name))]
    if not matches:
        whole = folder / f"{stem}{ending}"
        return {(0, 0): whole} if whole.is_file() else {}
    kinds = {(match["tp"] is not None, match["pp"] is not None) for match, _ in matches}
    if len(kinds) > 1:
        names = sorted(path.name for _, path in matches)
        raise UserError(
            f"{folder} holds shards of several layouts ({names[0]}, {names[-1]}): keep those of one run only"
        )
    has_tensor, has_pipeline = kinds.pop()
    found = {(int(match["tp"] or 0), int(match["pp"] or 0)): path for match, path in matches}
    degrees = [1 + max(place[axis] for place in found) for axis in (0, 1)]
    for tensor in range(degrees[0]):
        for pipeline in range(degrees[1]):
            if (tensor, pipeline) not in found:
                ranks = {
                    "tensor": tensor if has_tensor else None,
                    "pipeline": pipeline if has_pipeline else None,
                }
                raise UserError(
                    f"{folder / shard_name(stem, **ranks, ending=ending)} is missing: copy all shards of the run"
                )
    return found


class ShardedCheckpoint:
    """Read access to the tensors of a model whose ranks wrote a file each.

    Attributes:
        tensor_degree: Tensor-parallel ranks that wrote.
        pipeline_degree: Pipeline stages that wrote.
        format: "pd", as `weights.Checkpoint` calls such files.
        paths: The files by (tensor, pipeline) rank.
    """

    format = "pd"

    def __init__(self, shards: Mapping[tuple[int, int], Path], *, family: Family, config: Any):
        self.paths = dict(shards)
        self.tensor_degree = 1 + max(tensor for tensor, _ in shards)
        self.pipeline_degree = 1 + max(pipeline for _, pipeline in shards)
        self._family, self._config = family, config
        self._parts: dict[str, list[PickledArray]] = {}
        for pipeline in range(self.pipeline_degree):
            self._add_stage(pipeline)

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Every whole tensor's shape, by name."""
        return {name: self._whole_shape(name) for name in self._parts}

    def split(self, name: str) -> Split | None:
        """How the ranks divide a tensor; None when all of them hold it whole."""
        return find_split(self._family, tensor_of(name), self._config, degree=self.tensor_degree)

    def parts(self, name: str) -> list[np.ndarray]:
        """What the tensor-parallel ranks hold of a tensor, mapped; bfloat16 as uint16."""
        return [array.read() for array in self._parts[name]]

    def read(self, name: str) -> np.ndarray:
        """The whole tensor: mapped where every rank holds it, joined in memory otherwise."""
        split = self.split(name)
        return split.whole(self.parts(name)) if split and not is_scalar(name) else self._parts[name][0].read()

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        split, shape = self.split(name), self._parts[name][0].shape
        return split.whole_shape(shape, self.tensor_degree) if split and not is_scalar(name) else shape

    def _add_stage(self, pipeline: int) -> None:
        """Notes the arrays of one stage; a tied tensor that two stages hold counts once."""
        files = [read_pdparams(self.paths[tensor, pipeline]) for tensor in range(self.tensor_degree)]
        for tensor, file in enumerate(files):
            if different := sorted(file.keys() ^ files[0].keys()):
                raise UserError(
                    f"{self.paths[tensor, pipeline]} and {self.paths[0, pipeline]} hold different tensors "
                    f"({', '.join(different[:3])}): they are not of one run"
                )
            for name, array in file.items():
                first = files[0][name]
                if (array.shape, array.dtype) != (first.shape, first.dtype):
                    raise UserError(
                        f"{self.paths[tensor, pipeline]}: {name} is {list(array.shape)} {array.dtype}, but "
                        f"{list(first.shape)} {first.dtype} in {self.paths[0, pipeline].name}: they are not of one run"
                    )
        for name in files[0]:
            self._parts.setdefault(name, [file[name] for file in files])


def tensor_of(name: str) -> str:
    """The parameter whose shape a stored tensor has: itself, or that of `<parameter>/<accumulator>`."""
    return name.rpartition("/")[0] or name


def is_scalar(name: str) -> bool:
    """Whether the name is of optimizer state that is one number per parameter, and so never divided."""
    return "/" in name and name.rpartition("/")[2].startswith(("beta1_pow", "beta2_pow"))


def open_shards(
    folder: Path,
    *,
    stem: str = MODEL_STEM,
    ending: str = ".pdparams",
    family: Family | None = None,
    config: Any = None,
) -> ShardedCheckpoint:
    """Opens a folder's shards of any degrees; nothing but names and shapes is read.

    Args:
        folder: Holds the shards, and config.json unless `config` is given.
        stem: First part of the file names: `MODEL_STEM`, `LORA_STEM`, `PREFIX_STEM` or that of other files.
        ending: Last part.
        family: Record of the model; by default the one that covers the folder's config.json.
        config: Configuration of the base model as the family adapts it.

    Raises:
        UserError: No shards, one missing, damaged or of another run, or no usable config.json.
    """
    shards = find_shards(folder, stem, ending)
    if not shards:
        raise UserError(f"{folder} holds no {stem}*{ending}")
    if config is None:
        config = _read_config(folder)
        family = family or find_family(config)
        config = family.adapt_config(config)
    return ShardedCheckpoint(shards, family=family or find_family(config), config=config)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): copy the configuration of the base model there"
        ) from None
