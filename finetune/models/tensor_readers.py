"""Which function reads what a parameter must hold: names, layout, parts and wholes.

Files have PaddleNLP's layout, or Hugging Face's, mapped by PaddleNLP's name table; layers are joined in one and apart
in the other; under tensor parallelism a rank wants its part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.families.family import Family
from finetune.families.tensor_splits import find_split
from finetune.models.parameters import join_blocks
from finetune.models.vocabulary import VocabularyGrowth, grown_part_reader
from finetune.storage.checkpoints import TensorFiles
from finetune.storage.quantisation.stored_tensors import PackedTensor
from finetune.storage.splits import Split

Reader = Callable[[], NDArray[Any]]


def plan_readers(
    model_class: Any,
    config: Any,
    checkpoint: TensorFiles,
    *,
    family: Family,
    growth: VocabularyGrowth | None = None,
    needs_whole: Callable[[str], bool] | None = None,
) -> dict[str, Reader]:
    """Parameter name -> function that reads what this rank's parameter must hold.

    Nothing is read yet. Weights that the model does not know keep their names, to be reported. A growing
    vocabulary matters here only for tensors that are split over cards; others grow as they are assigned.

    Tensors are taken apart, then divided over the ranks, then joined, so that a layer that is fused in the model
    but not in the files is joined from this rank's parts. What `needs_whole` names is read whole all the same.
    """
    readers = _paddle_readers(checkpoint, _name_table(model_class, config, family))
    readers = _with_unfused(model_class, config, readers)
    degree, rank = config.tensor_parallel_degree, config.tensor_parallel_rank
    if degree <= 1:
        return _with_fused(model_class, config, readers)
    for name, read in readers.items():
        split = find_split(family, name, config, degree=degree)
        if needs_whole and needs_whole(name):
            continue
        if split and growth and growth.covers(name):
            readers[name] = grown_part_reader(read, growth, split, degree=degree, rank=rank)
        elif split:
            readers[name] = _split_reader(read, split, degree=degree, rank=rank)
    local = copy.copy(config)
    for field in (family.fields.num_heads, family.fields.num_kv_heads):
        if field:
            setattr(local, field, getattr(config, field) // degree)
    return _with_fused(model_class, local, readers)


def plan_packed(
    model_class: Any, config: Any, checkpoint: TensorFiles, *, family: Family
) -> dict[str, PackedTensor]:
    """Parameter name -> packed tensor of the files, as PaddleNLP's model calls it.

    What the model joins or takes apart has other names than the files, and is not among its parameters then.
    """
    table = _name_table(model_class, config, family)
    is_torch = _is_torch_layout(checkpoint, table)
    return {
        table[name].target_name if is_torch and name in table else name: tensor
        for name, tensor in checkpoint.tensors.items()
        if isinstance(tensor, PackedTensor)
    }


def _name_table(model_class: Any, config: Any, family: Family) -> dict[str, Any]:
    """PaddleNLP's mappings by Hugging Face's names, with the first parts that it may lack."""
    mappings = model_class._get_name_mappings(config)
    if not family.source_prefix:
        return {mapping.source_name: mapping for mapping in mappings}
    return {
        f"{family.source_prefix}.{mapping.source_name}": replace(
            mapping, target_name=f"{family.base_prefix}.{mapping.target_name}"
        )
        for mapping in mappings
    }


def _paddle_readers(checkpoint: TensorFiles, mappings: Mapping[str, Any]) -> dict[str, Reader]:
    """Tensors under PaddleNLP's names and in its layout, read when called.

    Hugging Face's linear layers are stored as [out, in], PaddleNLP's as [in, out]. Names that the table
    does not know keep their own, to be reported.
    """
    names = checkpoint.names
    if not _is_torch_layout(checkpoint, mappings):
        return {name: _reader(checkpoint, name) for name in names}
    readers = {}
    for name in names:
        mapping = mappings.get(name)
        if mapping is None:
            readers[name] = _reader(checkpoint, name)
        else:
            readers[mapping.target_name] = _mapped_reader(checkpoint, name, mapping)
    return readers


def _is_torch_layout(checkpoint: TensorFiles, mappings: Mapping[str, Any]) -> bool:
    if checkpoint.format is not None:
        return checkpoint.format == "pt"
    # Files without the mark: told by a name that only Hugging Face uses.
    targets = {mapping.target_name for mapping in mappings.values()}
    return any(name in mappings and name not in targets for name in checkpoint.names)


def _reader(checkpoint: TensorFiles, name: str) -> Reader:
    return lambda: checkpoint.read(name)


def _mapped_reader(checkpoint: TensorFiles, name: str, mapping: Any) -> Reader:
    return lambda: mapping.run({name: checkpoint.read(name)}, name)


def _with_fused(model_class: Any, config: Any, sources: dict[str, Reader]) -> dict[str, Reader]:
    """Joins query/key/value and gate/up weights where the config's fuse flags ask for it.

    PaddleNLP gives the work as (parts..., whole) -> function.
    """
    readers = dict(sources)
    actions, _ = model_class.get_fuse_or_split_param_convert_actions(config, list(sources), is_fuse=True)
    for (*parts, whole), action in actions.items():
        readers[whole] = _fused_reader([readers.pop(part) for part in parts], action)
    return readers


def _with_unfused(model_class: Any, config: Any, sources: dict[str, Reader]) -> dict[str, Reader]:
    """Takes apart query/key/value and gate/up weights that the files join and the config does not."""
    readers = dict(sources)
    actions, _ = model_class.get_fuse_or_split_param_convert_actions(config, list(sources), is_fuse=False)
    for (*parts, whole), action in actions.items():
        source = readers.pop(whole)
        readers |= {part: _part_reader(source, action, index) for index, part in enumerate(parts)}
    return readers


def _split_reader(whole: Reader, split: Split, *, degree: int, rank: int) -> Reader:
    def read() -> NDArray[Any]:
        array = whole()
        places = split.places(array.shape, degree, rank)
        return array[places[0]] if len(places) == 1 else join_blocks(array, places, split.axis)

    return read


def _fused_reader(parts: list[Reader], action: Callable[[list[NDArray[Any]]], NDArray[Any]]) -> Reader:
    return lambda: action([np.asarray(part()) for part in parts])


def _part_reader(whole: Reader, action: Callable[[NDArray[Any]], Any], index: int) -> Reader:
    return lambda: action(np.asarray(whole()))[index]
