"""The weights of a quantised folder as single tensors again, packed or as what they stand for.

A layer that takes several tensors of a file (codes, scales, zero points) appears as one tensor, `<layer>.weight`, of the
shape that it would have unquantised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.storage.dtypes import Array, array_dtype, dtype_name, rounded
from finetune.storage.joined_tensors import JoinedTensor
from finetune.storage.output_file import OutputFile
from finetune.storage.quantisation.bitsandbytes_tensors import STATE, read_four_bit, read_int8, read_state
from finetune.storage.quantisation.integer_tensors import (
    gptq_bits,
    read_awq,
    read_gptq,
    read_integers,
    read_words,
)
from finetune.storage.quantisation.packed_weights import PackedMatrix
from finetune.storage.quantisation.paddlenlp_tensors import read_paddlenlp
from finetune.storage.quantisation.stored_format import (
    AWQ,
    BITSANDBYTES,
    COMPRESSED,
    GPTQ,
    INTEGER_FORM,
    PACKED_FORM,
    PADDLENLP,
    StoredFormat,
)

_Read = Callable[[str, Mapping[str, Any], StoredFormat], PackedMatrix]
Stored = Mapping[str, JoinedTensor]
_Facts = tuple[tuple[int, int], str]
"""[out, in], and the element type of the values."""


@dataclass(frozen=True)
class _Layout:
    """Which tensors make a layer.

    Attributes:
        needed: Ends of names that every quantised layer has; nothing else has the first.
        optional: Ends of names that it may have.
        read: Makes the matrix.
        facts: Shape and element type, with little read.
        ignored: Ends of what says nothing of the weight.
        is_turned: Whether a tensor is [out, in]; PaddleNLP names what it holds itself, which is the transpose.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    read: _Read
    facts: Callable[[str, Stored, StoredFormat], _Facts]
    ignored: tuple[str, ...] = ()
    is_turned: bool = True


def _four_bit_facts(name: str, parts: Stored, form: StoredFormat) -> _Facts:
    state = read_state(name, {end: each.read() for end, each in parts.items() if end.startswith(STATE)})
    return state.shape, state.dtype


def _int8_facts(name: str, parts: Stored, form: StoredFormat) -> _Facts:
    return _matrix_shape(name, parts["weight"]), "float32"


def _gptq_facts(name: str, parts: Stored, form: StoredFormat) -> _Facts:
    num_words, num_rows = _matrix_shape(name, parts["qweight"])
    order = parts.get("g_idx")
    bits = gptq_bits(name, num_words, form, num_columns=order.shape[0] if order and order.shape else None)
    return (num_rows, num_words * 32 // bits), dtype_name(parts["scales"].dtype)


def _awq_facts(name: str, parts: Stored, form: StoredFormat) -> _Facts:
    num_columns, num_words = _matrix_shape(name, parts["qweight"])
    return (num_words * 8, num_columns), dtype_name(parts["scales"].dtype)


def _words_facts(name: str, parts: Stored, form: StoredFormat) -> _Facts:
    num_rows, num_columns = (int(size) for size in parts["weight_shape"].load().reshape(-1)[:2])
    return (num_rows, num_columns), dtype_name(parts["weight_scale"].dtype)


def _integers_facts(name: str, parts: Stored, form: StoredFormat) -> _Facts:
    return _matrix_shape(name, parts["weight"]), dtype_name(parts["weight_scale"].dtype)


def _paddlenlp_facts(name: str, parts: Stored, form: StoredFormat) -> _Facts:
    return _matrix_shape(name, parts["quant_weight"]), dtype_name(parts["quant_scale"].dtype)


def _matrix_shape(name: str, tensor: JoinedTensor) -> tuple[int, int]:
    if len(tensor.shape) != 2:
        raise UserError(
            f"{name}: {tensor.name} has shape {list(tensor.shape)}, but is a matrix: copy the model again"
        )
    return tensor.shape[0], tensor.shape[1]


_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_FOUR_BIT_PARTS = (
    "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", f"{STATE}nf4", f"{STATE}fp4",
)  # fmt: skip
_GPTQ_PARTS = ("qweight", "qzeros", "scales")
_LAYOUTS = {
    f"{BITSANDBYTES} 4": _Layout(("weight.absmax", "weight"), _FOUR_BIT_PARTS, read_four_bit, _four_bit_facts),
    f"{BITSANDBYTES} 8": _Layout(("SCB", "weight"), ("weight_format",), read_int8, _int8_facts),
    GPTQ: _Layout(_GPTQ_PARTS, ("g_idx",), read_gptq, _gptq_facts),
    AWQ: _Layout(_GPTQ_PARTS, (), read_awq, _awq_facts),
    f"{COMPRESSED} {PACKED_FORM}": _Layout(
        ("weight_packed", "weight_scale", "weight_shape"), ("weight_zero_point", "weight_g_idx"),
        read_words, _words_facts, _ACTIVATIONS,
    ),
    f"{COMPRESSED} {INTEGER_FORM}": _Layout(
        ("weight_scale", "weight"), ("weight_zero_point", "weight_g_idx"),
        read_integers, _integers_facts, _ACTIVATIONS,
    ),
    PADDLENLP: _Layout(("quant_weight", "quant_scale"), (), read_paddlenlp, _paddlenlp_facts, is_turned=False),
}  # fmt: skip


def _layout_of(form: StoredFormat) -> _Layout:
    detail = {BITSANDBYTES: form.bits, COMPRESSED: form.form}.get(form.method)
    return _LAYOUTS[form.method if detail is None else f"{form.method} {detail}"]


@dataclass(frozen=True, kw_only=True)
class PackedTensor(JoinedTensor):
    """A quantised layer's weight.

    Attributes:
        stored: End of the name -> tensor of the layer.
        form: How they are stored.
        matrix_shape: [out, in].
        value_dtype: Element type that `load` gives.
    """

    stored: Stored
    form: StoredFormat
    matrix_shape: tuple[int, int]
    value_dtype: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        return array_dtype(self.value_dtype)

    @property
    def is_turned(self) -> bool:
        """Whether the tensor is [out, in]."""
        return _layout_of(self.form).is_turned

    @property
    def shape(self) -> tuple[int, ...]:
        """As it would be unquantised."""
        return self.matrix_shape if self.is_turned else self.matrix_shape[::-1]

    def read_packed(self) -> PackedMatrix:
        """The packed matrix [out, in].

        Raises:
            UserError: The tensors do not fit together.
        """
        parts = {end: each.read() for end, each in self.stored.items()}
        return _layout_of(self.form).read(self.name, parts, self.form)

    def read(self) -> Array:
        """What it stands for, in memory."""
        return self.load()

    def load(self) -> Array:
        """What it stands for, in memory."""
        values = rounded(self.read_packed().values(), self.dtype)
        return values if self.is_turned else np.ascontiguousarray(values.T)

    def write(self, file: OutputFile, offset: int) -> None:
        """Writes what it stands for."""
        file.write(np.ascontiguousarray(self.load()).reshape(-1).view(np.uint8), offset)


def with_packed(tensors: Stored, form: StoredFormat, folder: object) -> dict[str, JoinedTensor]:
    """The tensors of a quantised folder, those of each layer as one.

    Args:
        tensors: Of the files, by their names.
        form: What config.json says of them.
        folder: Of the files, for messages.

    Raises:
        UserError: None is packed, or a layer lacks some of its tensors.
    """
    layout = _layout_of(form)
    marker = f".{layout.needed[0]}"
    layers = sorted(name.removesuffix(marker) for name in tensors if name.endswith(marker))
    if not layers:
        raise UserError(
            f"model {folder} is quantised by its {form.told_by} ({form.label}), but its files hold no {marker[1:]}: "
            f"if they are ordinary weights, remove {_place(form)}; else copy the model again"
        )
    ends = (*layout.needed, *layout.optional)
    taken = {f"{layer}.{end}" for layer in layers for end in (*ends, *layout.ignored)}
    found = {name: tensor for name, tensor in tensors.items() if name not in taken}
    for layer in layers:
        parts = {end: tensors[f"{layer}.{end}"] for end in ends if f"{layer}.{end}" in tensors}
        if missing := [end for end in layout.needed if end not in parts]:
            raise UserError(
                f"model {folder}: {layer} is quantised ({form.label}), but its files lack the layer's "
                f"{', '.join(missing)}: copy the model again"
            )
        name, own = f"{layer}.weight", form.for_layer(layer)
        shape, dtype = layout.facts(name, parts, own)
        found[name] = PackedTensor(
            name,
            parts[layout.needed[0]].parts,
            stored=parts,
            form=own,
            matrix_shape=shape,
            value_dtype=dtype,
        )
    return found


def _place(form: StoredFormat) -> str:
    return "quantization_config from config.json" if form.told_by == "config.json" else form.told_by
