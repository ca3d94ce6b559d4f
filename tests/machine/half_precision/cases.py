"""Operators with inputs, as Paddle's users call them; each case runs in any floating-point dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F


def values(*shape: int, seed: int = 0, low: float = 0.25, high: float = 2.0) -> np.ndarray:
    """float32 numbers of both signs, none near 0."""
    source = np.random.default_rng(seed + len(shape))
    return (source.uniform(low, high, shape) * source.choice([-1, 1], shape)).astype("float32")


X, Y = values(4, 6), values(4, 6, seed=1)
POSITIVE = np.abs(X)
ROW, SQUARE = values(6, seed=2), values(6, 6, seed=3)
IDS = np.array([[0, 3, 3], [1, 3, 0]])
MASK = X > 0

UNARY: dict[str, Callable[[Any], Any]] = {
    "abs": paddle.abs,
    "cos": paddle.cos,
    "exp": paddle.exp,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate=True),
    "leaky_relu": F.leaky_relu,
    "neg": lambda x: -x,
    "relu": F.relu,
    "scale": lambda x: x * 1.7,
    "scale_and_shift": lambda x: paddle.scale(x, 1.3, 0.7),
    "sigmoid": F.sigmoid,
    "silu": F.silu,
    "sin": paddle.sin,
    "square": paddle.square,
    "swish": F.swish,
    "tanh": paddle.tanh,
    "clip": lambda x: x.clip(-1.0, 1.0),
    "dropout_off": lambda x: F.dropout(x, 0.0),
    "pow_2": lambda x: x**2,
    "number_minus": lambda x: 1.25 - x,
    "number_over": lambda x: 1.5 / x,
    "over_number": lambda x: x / 3,
    "plus_number": lambda x: x + 0.1,
    "softmax": lambda x: F.softmax(x, -1),
    "softmax_first_dim": lambda x: F.softmax(x, 0),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "softplus": F.softplus,
    "mean": lambda x: x.mean(-1),
    "mean_all": lambda x: x.mean(),
    "sum": lambda x: x.sum(0),
    "sum_all": lambda x: x.sum(),
    "max": lambda x: x.max(-1),
    "min": lambda x: x.min(0),
    "amax": lambda x: paddle.amax(x, -1),
    "logsumexp": lambda x: paddle.logsumexp(x, -1),
    "norm": lambda x: paddle.linalg.norm(x, axis=-1),
    "cumsum": lambda x: x.cumsum(-1),
    "prod": lambda x: x.prod(-1),
    "reshape": lambda x: x.reshape([3, 8]),
    "transpose": lambda x: x.transpose([1, 0]),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "flatten": lambda x: x.flatten(),
    "expand": lambda x: x.unsqueeze(0).expand([3, 4, 6]),
    "broadcast_to": lambda x: paddle.broadcast_to(x.unsqueeze(1), [4, 2, 6]),
    "tile": lambda x: x.tile([2, 1]),
    "repeat_interleave": lambda x: x.repeat_interleave(2, axis=0),
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "pad": lambda x: F.pad(x, [1, 2], value=0.0),
    "tril": paddle.tril,
    "triu": paddle.triu,
    "split": lambda x: paddle.split(x, 2, axis=-1)[1],
    "chunk": lambda x: x.chunk(2)[0],
    "unbind": lambda x: paddle.unbind(x)[1],
    "stack": lambda x: paddle.stack([x, x]),
    "concat": lambda x: paddle.concat([x, x], axis=-1),
    "slice": lambda x: x[1:3, ::2],
    "slice_new_axis": lambda x: x[:, None, 2:],
    "one_row": lambda x: x[2],
    "rows": lambda x: x[paddle.to_tensor([0, 2, 2])],
    "rows_by_list": lambda x: x[[3, 3, 0]],
    "elements": lambda x: x[paddle.to_tensor([0, 1, 1]), paddle.to_tensor([2, 3, 3])],
    "mask": lambda x: x[paddle.to_tensor(MASK)],
    "masked_select": lambda x: paddle.masked_select(x, paddle.to_tensor(MASK)),
    "masked_fill": lambda x: x.masked_fill(paddle.to_tensor(MASK), 0.5),
    "gather": lambda x: paddle.gather(x, paddle.to_tensor([1, 1, 3])),
    "gather_nd": lambda x: paddle.gather_nd(x, paddle.to_tensor([[1, 1], [1, 1], [3, 0]])),
    "index_select": lambda x: paddle.index_select(x, paddle.to_tensor([0, 0, 2])),
    "take_along_axis": lambda x: paddle.take_along_axis(x, paddle.to_tensor([[0], [1], [5], [5]]), 1),
    "topk": lambda x: paddle.topk(x, 2)[0],
    "sort": lambda x: x.sort(-1),
    "embedding": lambda x: F.embedding(paddle.to_tensor(IDS), x),
    "cross_entropy": lambda x: F.cross_entropy(x, paddle.to_tensor([0, 2, 5, 1]), reduction="sum"),
    "swiglu": lambda x: F.swiglu(x),
    "clone": lambda x: x.clone(),
    "assign": paddle.assign,
    "set_rows": lambda x: _set(x, slice(1, 3), 0.5),
    "set_rows_by_number": lambda x: _set(x, paddle.to_tensor([0, 2]), 1.5),
    "put_along_axis": lambda x: paddle.put_along_axis(
        x, paddle.to_tensor([[0], [1], [5], [5]]), paddle.ones([4, 1], x.dtype), 1
    ),
    "scatter": lambda x: paddle.scatter(x, paddle.to_tensor([1]), x[0:1] * 1.0),
}
"""Of one tensor [4, 6]."""

POSITIVE_ONLY: dict[str, Callable[[Any], Any]] = {
    "log": paddle.log,
    "log1p": paddle.log1p,
    "sqrt": paddle.sqrt,
    "rsqrt": paddle.rsqrt,
    "reciprocal": paddle.reciprocal,
    "pow_half": lambda x: x**0.5,
    "number_power": lambda x: 2.0**x,
}
"""Of one positive tensor [4, 6]."""

BINARY: dict[str, tuple[Callable[[Any, Any], Any], np.ndarray, np.ndarray]] = {
    "add": (lambda x, y: x + y, X, Y),
    "add_row": (lambda x, y: x + y, X, ROW),
    "subtract": (lambda x, y: x - y, X, Y),
    "multiply": (lambda x, y: x * y, X, Y),
    "multiply_row": (lambda x, y: x * y, X, ROW),
    "divide": (lambda x, y: x / y, X, Y),
    "maximum": (paddle.maximum, X, Y),
    "minimum": (paddle.minimum, X, Y),
    "power": (lambda x, y: x**y, POSITIVE, Y),
    "where": (lambda x, y: paddle.where(paddle.to_tensor(MASK), x, y), X, Y),
    "matmul": (lambda x, y: x @ y, X, SQUARE),
    "matmul_transposed": (lambda x, y: paddle.matmul(x, y, transpose_y=True), X, Y),
    "bmm": (lambda x, y: paddle.bmm(x.unsqueeze(0), y.unsqueeze(0)), X, SQUARE),
    "linear": (lambda x, y: F.linear(x, y), X, SQUARE),
    "outer": (lambda x, y: paddle.einsum("ij,ik->jk", x, y), X, Y),
    "concat_two": (lambda x, y: paddle.concat([x, y], 0), X, Y),
    "swiglu_two": (lambda x, y: F.swiglu(x, y), X, Y),
    "layer_norm": (lambda x, y: F.layer_norm(x, [6], y, paddle.zeros([6], y.dtype)), X, ROW),
    "set_rows_to": (lambda x, y: _set(x, slice(0, 2), y[0:2]), X, Y),
    "addmm": (lambda x, y: paddle.addmm(paddle.zeros([4, 6], x.dtype), x, y), X, SQUARE),
}
"""Of two tensors."""

ALL: dict[str, tuple[Callable[..., Any], tuple[np.ndarray, ...]]] = {
    **{name: (function, (X,)) for name, function in UNARY.items()},
    **{name: (function, (POSITIVE,)) for name, function in POSITIVE_ONLY.items()},
    **{name: (function, (x, y)) for name, (function, x, y) in BINARY.items()},
}
"""Each a single operator, so that everything is rounded once."""


def _set(x: Any, index: Any, value: Any) -> Any:
    """A copy of x with some elements set."""
    x = x * 1.0
    x[index] = value
    return x
