"""Tensors of a checkpoint, put together from what its ranks hold, with every sign that they are not of one run.

The ranks of a stage hold the same names; what tensor parallelism divides has the same shape on all of them, and what
it does not divide, such as norms, has the same bytes. A tied weight that two stages hold is the same on both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.merge import rank_files
from finetune.merge.rank_files import RankFiles
from finetune.merge.shards import JoinedTensor, StoredArray
from finetune.models.family import Family
from finetune.models.tensor_splits import Split, find_split

_LAYER_NUMBER = re.compile(r"\.(?:layers|h)\.(\d+)\.")
_NOT_ONE_RUN = "they are not of one run and step: copy the files of all ranks from the same checkpoint"
# PaddleNLP's prefix encoder: an embedding, and with `prefix_projection` two linear layers around an activation.
_PREFIX_SPLITS = {"0.weight": Split(0), "1.weight": Split(-1), "1.bias": Split(-1), "3.weight": Split(0)}


@dataclass(frozen=True)
class Source:
    """Where tensors come from and what is known of their model.

    Attributes:
        files: The ranks' files.
        kind: MODEL, LORA or PREFIX of `rank_files`.
        family: Record of the model; None where nothing is to be joined.
        config: Its configuration as the family adapts it.
        checks_replicas: Whether tensors that all ranks hold must be equal to the last bit.
    """

    files: RankFiles
    kind: str
    family: Family | None
    config: Mapping[str, Any]
    checks_replicas: bool = True


def joined_tensors(source: Source) -> list[JoinedTensor]:
    """Every tensor of a checkpoint, not yet read except for the comparison of what ranks hold twice.

    Raises:
        UserError: A file is damaged, a layer is missing, or files are of different runs.
    """
    tensors: dict[str, JoinedTensor] = {}
    for pipeline in range(source.files.pipeline_degree):
        for tensor in _stage(source, pipeline):
            first = tensors.setdefault(tensor.name, tensor)
            if first is not tensor and source.checks_replicas:
                for here, there in zip(tensor.parts, first.parts, strict=True):
                    _check_equal(tensor.name, there, here)
    if source.kind == rank_files.MODEL and source.family is not None:
        _check_layers(source, tensors)
    return list(tensors.values())


def _stage(source: Source, pipeline: int) -> Iterator[JoinedTensor]:
    degree = source.files.tensor_degree
    ranks = [rank_files.read_arrays(source.files.files[rank, pipeline]) for rank in range(degree)]
    paths = [source.files.files[rank, pipeline][0] for rank in range(degree)]
    for rank, path in zip(ranks, paths, strict=True):
        if different := sorted(rank.keys() ^ ranks[0].keys()):
            raise UserError(
                f"{path} and {paths[0].name} hold different tensors ({different[0]}): {_NOT_ONE_RUN}"
            )
    for name in ranks[0]:
        parts = tuple(rank[name] for rank in ranks)
        for part in parts[1:]:
            _check_alike(name, parts[0], part)
        split = _find_split(source, name)
        if split is not None:
            yield _divided(name, parts, split)
            continue
        for part in parts[1:] if source.checks_replicas else ():
            _check_equal(name, parts[0], part)
        yield JoinedTensor(name, parts[:1])


def _find_split(source: Source, name: str) -> Split | None:
    degree = source.files.tensor_degree
    if degree == 1:
        return None
    if source.kind == rank_files.PREFIX:
        return _PREFIX_SPLITS.get(name)
    assert source.family is not None
    return find_split(source.family, name, source.config, degree=degree)


def _divided(name: str, parts: tuple[StoredArray, ...], split: Split) -> JoinedTensor:
    tensor = JoinedTensor(name, parts, split)
    try:
        split.places(tensor.shape, len(parts), 0)
    except ValueError as error:
        raise UserError(f"{parts[0].path}: {name} cannot be joined ({error}): {_NOT_ONE_RUN}") from None
    return tensor


def _check_alike(name: str, first: StoredArray, other: StoredArray) -> None:
    if (first.shape, first.dtype) != (other.shape, other.dtype):
        raise UserError(
            f"{other.path}: {name} has shape {list(other.shape)} ({_dtype(other)}), but {list(first.shape)} "
            f"({_dtype(first)}) in {first.path.name}: {_NOT_ONE_RUN}"
        )


def _check_equal(name: str, first: StoredArray, other: StoredArray) -> None:
    """Compares what must be the same; a difference means another step, or ranks that drifted apart."""
    _check_alike(name, first, other)
    for ours, theirs in zip(first.blocks(), other.blocks(), strict=True):
        if not np.array_equal(ours, theirs):
            raise UserError(
                f"{other.path}: {name}, which every rank holds whole, differs from that in {first.path.name}: "
                f"{_NOT_ONE_RUN}. If they are, and rounding drove the ranks apart, add --differing_replicas first"
            )


def _check_layers(source: Source, tensors: Mapping[str, JoinedTensor]) -> None:
    """Says when the last stages are missing, which no file name tells."""
    assert source.family is not None
    num_layers = source.config.get(source.family.fields.num_layers)
    found = {int(match[1]) for name in tensors if (match := _LAYER_NUMBER.search(name))}
    if not num_layers or not found or found == set(range(int(num_layers))):
        return
    missing = sorted(set(range(int(num_layers))) - found)
    folder = _folder(source.files)
    if not missing:
        raise UserError(
            f"{folder} holds layer {max(found)}, but its config.json tells of {num_layers} layers: {_NOT_ONE_RUN}"
        )
    shown = ", ".join(map(str, missing[:8]))
    raise UserError(
        f"{folder} lacks layers {shown} of {num_layers}: the files of a pipeline stage are missing. Copy them there"
    )


def _folder(files: RankFiles) -> Path:
    return next(chain.from_iterable(files.files.values())).parent


def _dtype(array: StoredArray) -> str:
    return "bfloat16" if array.dtype == np.uint16 else str(array.dtype)
