"""Element types: what they are called here, in safetensors and in PyTorch's files, and as NumPy arrays.

NumPy has no bfloat16. Its 16 bits, the upper half of a float32, are held as 16-bit unsigned integers, which no
tensor of a model is otherwise; so uint16 means bfloat16 in the whole project.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.errors import UserError

Array = npt.NDArray[Any]

# Name in Paddle, PyTorch and configurations; code in safetensors; NumPy's type; PyTorch's kind of storage.
_TABLE = (
    ("float64", "F64", "<f8", "DoubleStorage"),
    ("float32", "F32", "<f4", "FloatStorage"),
    ("float16", "F16", "<f2", "HalfStorage"),
    ("bfloat16", "BF16", "<u2", "BFloat16Storage"),
    ("int64", "I64", "<i8", "LongStorage"),
    ("int32", "I32", "<i4", "IntStorage"),
    ("int16", "I16", "<i2", "ShortStorage"),
    ("int8", "I8", "|i1", "CharStorage"),
    ("uint8", "U8", "|u1", "ByteStorage"),
    ("bool", "BOOL", "|b1", "BoolStorage"),
)
NAMES = tuple(name for name, _, _, _ in _TABLE)
SAFETENSORS_CODES = {code: np.dtype(array) for _, code, array, _ in _TABLE}
TORCH_STORAGES = {storage: array for _, _, array, storage in _TABLE}
BFLOAT16 = SAFETENSORS_CODES["BF16"]
_CODES = {dtype: code for code, dtype in SAFETENSORS_CODES.items()}
SAFETENSORS_CODES["U16"] = BFLOAT16  # what PaddleNLP writes for bfloat16
_ARRAY_NAMES = {np.dtype(array).name: name for name, _, array, _ in _TABLE}
_QUIET_NAN = 0x7FC00000


def dtype_name(dtype: Any) -> str:
    """The name alone: float32 of `paddle.float32`; bfloat16 of NumPy's uint16."""
    name = str(dtype).rpartition(".")[2]
    return _ARRAY_NAMES.get(name, name)


def array_dtype(dtype: Any) -> np.dtype[Any]:
    """NumPy's type for the numbers of a type of Paddle's, of NumPy's or by name."""
    name = dtype_name(dtype)
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def safetensors_code(dtype: np.dtype[Any]) -> str:
    """What a safetensors header calls a type of NumPy's.

    Raises:
        UserError: It has no name for it here.
    """
    if dtype not in _CODES:
        raise UserError(
            f"element type {dtype} is not written: convert the tensors to one of {', '.join(NAMES)}"
        )
    return _CODES[dtype]


def num_bytes(dtype: Any, shape: Iterable[int]) -> int:
    """Size of a tensor."""
    return math.prod(shape) * array_dtype(dtype).itemsize


def as_float32(array: Array) -> Array:
    """Widens stored floats, bfloat16 among them; no copy for float32."""
    if array.dtype == BFLOAT16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.asarray(array, dtype=np.float32)


def rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    """float32 -> the given type, to the nearest value, ties to even."""
    if dtype != BFLOAT16:
        return array.astype(dtype, copy=False)
    values = np.array(array, np.float32, order="C")
    return round_to_bfloat16(values, np.empty(values.shape, np.uint32))


def add_bfloat16(total: Array, addend: Array, scratch: Array) -> Array:
    """The float32 `total` plus a bfloat16 array, as bfloat16; `total` and the uint32 `scratch` are overwritten."""
    np.copyto(scratch, addend)
    np.left_shift(scratch, np.uint32(16), out=scratch)
    np.add(total, scratch.view(np.float32), out=total)
    return round_to_bfloat16(total, scratch)


def round_to_bfloat16(values: Array, scratch: Array) -> Array:
    """float32 -> the nearest bfloat16, ties to even; both arrays, float32 and uint32, are overwritten.

    Returns:
        The upper halves of `values` after rounding, as a view.
    """
    bits = values.view(np.uint32)
    # Rounding up would turn some bit patterns of "not a number" into infinity or zero.
    is_nan = np.isnan(values)
    if is_nan.any():
        bits[is_nan] = _QUIET_NAN
    np.right_shift(bits, np.uint32(16), out=scratch)
    np.bitwise_and(scratch, np.uint32(1), out=scratch)
    np.add(scratch, np.uint32(0x7FFF), out=scratch)
    np.add(bits, scratch, out=bits)
    return bits.reshape(*bits.shape, 1).view(np.uint16)[..., 1]  # little end first


def to_tensor(array: Array) -> Any:
    """A Paddle tensor of an array's content; uint16 gives bfloat16."""
    import paddle

    tensor = paddle.to_tensor(np.ascontiguousarray(array).reshape(array.shape))
    return tensor.view("bfloat16") if array.dtype == BFLOAT16 else tensor
