"""Operators of half precision that CPU has no form of at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle

from finetune.machine.half_precision import auto_cast
from finetune.machine.half_precision.calls import common_dtype
from finetune.machine.half_precision.tensor_types import find_tensors, is_half, round_to, to_dtype, widen


class LinearCall:
    """Stands for `paddle._C_ops.linear`, which `paddle.nn.functional.linear` calls where there is no GPU.

    On a GPU that function calls `linear_v2`, which adds the bias before it rounds, or `matmul` without a bias.

    Args:
        original: Paddle's function.
    """

    def __init__(self, original: Callable[..., Any]):
        self.original = original
        self._matmul, self._add = paddle._C_ops.matmul, paddle._C_ops.add

    def __call__(self, x: Any, weight: Any, bias: Any = None) -> Any:
        """X [..., d] times weight [d, e] plus bias [e] -> [..., e].

        Raises:
            TypeError: The inputs are of several dtypes.
        """
        name = "matmul" if bias is None else "linear_v2"
        tensors, _ = find_tensors((x, weight, bias), {})
        if tensors and auto_cast.state.enabled:
            listed = "matmul_v2" if bias is None else name
            dtype = auto_cast.decide(name, listed, tensors)
            x, weight = to_dtype(x, dtype), to_dtype(weight, dtype)
            bias = bias if bias is None else to_dtype(bias, dtype)
            tensors, _ = find_tensors((x, weight, bias), {})
        if not any(is_half(tensor.dtype) for tensor in tensors):
            return self.original(x, weight, bias)
        dtype = common_dtype(name, tensors)
        product = self._matmul(widen(x), widen(weight), False, False)
        return round_to(product if bias is None else self._add(product, widen(bias)), dtype)
