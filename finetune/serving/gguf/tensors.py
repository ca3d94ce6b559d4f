"""The tensors of a model under GGUF's names, in the order and element types that llama.cpp expects.

    Llama's queries and keys: rows (head, half, pair) -> (head, pair, half)
    BLOOM's joined layer: rows (head, q k v, dim) -> (q k v, head, dim)

Vectors and the norms stay float32. A matrix whose rows are no multiple of 32 long has no place in Q8_0 and becomes F16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.families.family import Family
from finetune.serving.gguf.metadata import Sizes
from finetune.storage.dtypes import as_float32
from finetune.storage.writer import ComputedTensor, Tensor

TYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}
"""Name on the command line -> GGUF's."""

_Q8_BLOCK = 32
_QUERIES, _KEYS, _JOINED = ".q_proj.", ".k_proj.", ".query_key_value."


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: GGUF's.
        source: Where its numbers come from, with Hugging Face's name, shape and order.
        type: "F32", "F16" or "Q8_0".
        family: Record of the model.
        sizes: Of the model.
    """

    name: str
    source: Tensor
    type: str
    family: Family
    sizes: Sizes

    @property
    def num_bytes(self) -> int:
        """Size in the file; a block of Q8_0 is 32 numbers of a byte and their scale of two."""
        count = math.prod(self.source.shape)
        return {"F32": 4 * count, "F16": 2 * count, "Q8_0": count // _Q8_BLOCK * (_Q8_BLOCK + 2)}[self.type]

    def values(self) -> NDArray[Any]:
        """Its numbers in GGUF's order, float32, in the shape of the source."""
        return ordered(read_whole(self.source), self.source.name, self.family, self.sizes)

    def encode(self) -> NDArray[Any]:
        """What stands in the file.

        Raises:
            UserError: A number that is none, or that is too large for the type.
        """
        from gguf import GGMLQuantizationType, quants

        values = self.values()
        if not np.isfinite(values).all():
            raise UserError(
                f"{self.source.name} holds numbers that are infinite or none: use another checkpoint"
            )
        largest = float(np.abs(values).max(initial=0.0))
        limit = {"F32": math.inf, "F16": 65504.0, "Q8_0": 127 * 65504.0}[self.type]
        if largest > limit:
            raise UserError(
                f"{self.source.name} holds {largest:g}, but {self.type} ends at {limit:g}: use --type f32"
            )
        encoded: NDArray[Any] = quants.quantize(values, GGMLQuantizationType[self.type])
        return np.ascontiguousarray(encoded)


def plan_tensors(sources: Sequence[Tensor], family: Family, sizes: Sizes, type_name: str) -> list[GgufTensor]:
    """The tensors of the file, in the order of the sources.

    Args:
        sources: All tensors of the model in Hugging Face's form.
        family: Record of the model.
        sizes: Of the model.
        type_name: "F32", "F16" or "Q8_0", of the matrices.

    Raises:
        UserError: A tensor that llama.cpp's architecture has not.
    """
    import gguf

    assert family.gguf is not None
    architecture = next(
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf.architecture
    )
    names = gguf.get_tensor_name_map(architecture, sizes.num_layers)
    planned, unknown = [], []
    for source in sources:
        if source.name.endswith("rotary_emb.inv_freq"):
            continue  # worked out from the base by everyone
        published = source.name
        if family.hugging_face.bare:
            published = published.removeprefix(f"{family.hugging_face.prefix}.")
        name = names.get_name(published, try_suffixes=(".weight", ".bias"))
        if name is None:
            unknown.append(source.name)
            continue
        planned.append(GgufTensor(name, source, _type_of(source, type_name), family, sizes))
    if unknown:
        raise UserError(
            f"GGUF's {family.gguf.architecture} has no place for {', '.join(sorted(unknown)[:4])}: serve the Hugging "
            "Face folder with vLLM or transformers"
        )
    return planned


def _type_of(source: Tensor, type_name: str) -> str:
    if len(source.shape) < 2:
        return "F32"
    return "F16" if type_name == "Q8_0" and source.shape[-1] % _Q8_BLOCK else type_name


def read_whole(source: Tensor) -> NDArray[Any]:
    """All numbers of a tensor as float32."""
    if isinstance(source, ComputedTensor):
        blocks = [np.array(block).reshape(-1) for block in source.blocks()]
        return as_float32(np.concatenate(blocks).reshape(source.shape))
    return as_float32(source.load())


def ordered(values: NDArray[Any], name: str, family: Family, sizes: Sizes) -> NDArray[Any]:
    """Rows in the order in which llama.cpp expects them.

    Args:
        values: (rows, ...) in Hugging Face's order.
        name: Hugging Face's.
        family: Record of the model.
        sizes: Of the model.
    """
    form, shape = family.gguf, values.shape
    assert form is not None
    if form.interleaved and (_QUERIES in name or _KEYS in name):
        heads = sizes.num_heads if _QUERIES in name else sizes.num_kv_heads
        halves = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
        return halves.swapaxes(1, 2).reshape(shape)
    if form.joined_heads and _JOINED in name:
        parts = values.reshape(sizes.num_heads, 3, sizes.head_dim, *shape[1:])
        return parts.swapaxes(0, 1).reshape(shape)
    return values
