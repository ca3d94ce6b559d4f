"""The weights of a quantised model as a folder that predict_generation.py runs, and other tools load.

Tensors bear Hugging Face's names; packed ones are written as compressed-tensors or bitsandbytes write them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune.adapters.update_tensors import name_parts
from finetune.families.family import Family
from finetune.merge.hf_out import hugging_face_config, with_dtype
from finetune.models.hf_names import is_tied, is_turned, to_hugging_face
from finetune.models.layers import named_weights
from finetune.models.resolve import ResolvedModel
from finetune.models.shard_files import open_checkpoint
from finetune.storage.dtypes import Array
from finetune.storage.files import read_json_if_present, write_json
from finetune.storage.quantisation.packed_weights import PackedMatrix
from finetune.storage.quantisation.stored_writing import format_facts, stored_parts
from finetune.storage.writer import ComputedTensor, Layout, write_tensors

_JOINING = ("fuse_attention_qkv", "fuse_attention_ffn")


def write_packed_weights(
    model: Any, packed: Mapping[str, PackedMatrix], folder: Path, resolved: ResolvedModel, *, group_size: int
) -> None:
    """Writes weights and configuration into a folder that has config.json already.

    Args:
        model: PaddleNLP's, none of its layers joined.
        packed: Name of a linear layer -> its weight.
        folder: To fill.
        resolved: The model that was quantised.
        group_size: As its integers were rounded.
    """
    family, path = resolved.family, folder / "config.json"
    tied = is_tied(family.adapt_config(resolved.config), family)
    tensors = [
        ComputedTensor(name, array.dtype, array.shape, _one_block(array))
        for name, array in _named_arrays(model, packed, family, tied=tied)
    ]
    write_tensors(folder, tensors, Layout(format="pt"))
    config = read_json_if_present(path)
    assert resolved.folder is not None
    if open_checkpoint(resolved.folder, family, resolved.config).format != "pt":
        config = hugging_face_config(config, family, dtype="float32")
    config = {name: value for name, value in config.items() if name not in _JOINING}
    facts = format_facts(next(iter(packed.values())), group_size=group_size, head=family.head_module)
    write_json(path, with_dtype(config, "float32") | {"quantization_config": facts})


def _one_block(array: Array) -> Any:
    def blocks() -> Iterator[Array]:
        yield array

    return blocks


def _named_arrays(
    model: Any, packed: Mapping[str, PackedMatrix], family: Family, *, tied: bool
) -> Iterator[tuple[str, Array]]:
    for name, tensor in named_weights(model).items():
        layer, _, ending = name.rpartition(".")
        if name_parts(name):  # of an adapter that is in the weights already
            continue
        theirs = to_hugging_face(name, family)
        if ending == "weight" and layer in packed:
            for end, part in stored_parts(packed[layer], dtype="float32").items():
                yield f"{theirs.removesuffix('weight')}{end}", part
            continue
        array = tensor.astype("float32").numpy()
        turned = is_turned(name, array.shape, family, tied=tied)
        yield theirs, np.ascontiguousarray(array.T if turned else array)
