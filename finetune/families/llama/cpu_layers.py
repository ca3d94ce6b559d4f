"""Cheaper forms of the layers that dominate a training step on CPU; the mathematics is unchanged.

Paddle's CPU kernels are quick on matrix products and on elementwise work between equal shapes, and 10
to 150 times slower on some forms that PaddleNLP's layers are written in (times for a [8, 256, 256]
float32 tensor on one core, or [8, 4, 256, 256] for attention scores):

| form | ms | here instead | ms |
|---|---|---|---|
| `x.pow(2)` | 7.2 | `x.square()` | 0.05 |
| `[b, s, 1] * x` | 1.8 | `x * [b, s, 1]` | 0.18 |
| `q * cos` over broadcast heads | 3.0 | rows looked up per head, equal shapes | 0.04 |
| slice and concat of `rotate_half`, both ways | 10 | product with a signed permutation | 0.4 |
| scores + mask over broadcast heads | 14 | mask repeated per head once, equal shapes | 0.3 |
| `transpose([0, 2, 1, 3])` | 4.4 | rows gathered in the new order | 0.2 |

`install()` puts them into PaddleNLP's modules; off CPU, in static graphs, or in cases they do not
cover, each falls back to what stood there before.
"""

import math
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer

from finetune.machine.stand_ins import replace


class RMSNorm(PyLayer):
    """y = x / sqrt(mean(x^2) + epsilon) * weight, Zhang and Sennrich 2019, with its gradient by hand."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> paddle.Tensor:
        """Normalises the last axis of x [..., hidden] by weight [hidden]; float32."""
        inverse_rms = paddle.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)  # [..., 1]
        ctx.save_for_backward(x, weight, inverse_rms)
        # Asked here: recomputation hands the saved tensors back as ones that no longer say so.
        ctx.trains_x, ctx.trains_weight = not x.stop_gradient, not weight.stop_gradient
        return x * inverse_rms * weight

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """Gradients of x and weight; None, which Paddle insists on, for one that is not asked for."""
        x, weight, inverse_rms = ctx.saved_tensor()
        normed = x * inverse_rms
        grad_x = None
        if ctx.trains_x:
            grad_normed = grad * weight
            projection = (grad_normed * normed).mean(-1, keepdim=True)
            grad_x = (grad_normed - normed * projection) * inverse_rms
        if not ctx.trains_weight:
            return grad_x, None
        rows = (grad * normed).reshape([-1, x.shape[-1]])  # [rows, hidden]
        # A product with ones sums over rows ten times faster than the sum kernel does along the first axis.
        return grad_x, paddle.matmul(paddle.ones([1, rows.shape[0]], rows.dtype), rows).reshape(weight.shape)


class RowPermutation(PyLayer):
    """Gathers rows in a new order; the gradient gathers them back."""

    @staticmethod
    def forward(ctx: Any, rows: paddle.Tensor, order: paddle.Tensor, inverse: paddle.Tensor) -> paddle.Tensor:
        """Rows [n, dim] in the given order [n]; `inverse` is the order that undoes it."""
        ctx.save_for_backward(inverse)
        return paddle.gather(rows, order)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        """The rows of the gradient back in their places."""
        (inverse,) = ctx.saved_tensor()
        return paddle.gather(grad, inverse)


class Rotation(PyLayer):
    """Rotary position embedding, Su et al. 2021: x * cos + rotate_half(x) * sin."""

    @staticmethod
    def forward(
        ctx: Any, x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor, half_turn: paddle.Tensor
    ) -> paddle.Tensor:
        """Rotates x [b, s, heads, dim]; cos and sin have its shape, half_turn [dim, dim] is rotate_half."""
        ctx.save_for_backward(cos, sin, half_turn)
        return x * cos + paddle.matmul(x, half_turn) * sin

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        """The transposed rotation."""
        cos, sin, half_turn = ctx.saved_tensor()
        return grad * cos + paddle.matmul(grad * sin, half_turn, transpose_y=True)


class SwiGLU(PyLayer):
    """silu(gate) * up, Shazeer 2020, with its gradient by hand."""

    @staticmethod
    def forward(ctx: Any, gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
        """Both inputs and the result have one shape."""
        sigmoid = F.sigmoid(gate)
        ctx.save_for_backward(gate, up, sigmoid)
        ctx.trains_gate, ctx.trains_up = not gate.stop_gradient, not up.stop_gradient
        return gate * sigmoid * up

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """Gradients of gate and up; None for one that is not asked for."""
        gate, up, sigmoid = ctx.saved_tensor()
        silu = gate * sigmoid
        grad_gate = grad * up * (sigmoid + silu - silu * sigmoid) if ctx.trains_gate else None
        return grad_gate, grad * silu if ctx.trains_up else None


def swap_axes_1_2(x: paddle.Tensor) -> paddle.Tensor:
    """[b, m, n, dim] -> [b, n, m, dim], contiguous."""
    batch, m, n, dim = x.shape
    order = _swapped_rows(batch, m, n)
    inverse = _swapped_rows(batch, n, m)
    return RowPermutation.apply(x.reshape([-1, dim]), order, inverse).reshape([batch, n, m, dim])


def attention(
    query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, mask: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Softmax attention over an additive mask.

    Args:
        query: [b, s_q, heads, dim].
        key: [b, s_k, heads, dim], heads already repeated for grouped queries.
        value: Like key.
        mask: Additive, [b, 1, s_q, s_k] or [b, heads, s_q, s_k].

    Returns:
        Output [b, s_q, heads * dim] and weights [b, heads, s_q, s_k].
    """
    batch, num_queries, num_heads, head_dim = query.shape
    query, key, value = (
        swap_axes_1_2(query * (1 / math.sqrt(head_dim))),
        swap_axes_1_2(key),
        swap_axes_1_2(value),
    )
    scores = paddle.matmul(query, key, transpose_y=True)
    if mask.shape[1] == 1 and num_heads > 1:
        mask = paddle.concat([mask] * num_heads, axis=1)
    weights = F.softmax(scores + mask, axis=-1)
    output = swap_axes_1_2(paddle.matmul(weights, value))
    return output.reshape([batch, num_queries, num_heads * head_dim]), weights


def rotate(
    x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor, position_ids: paddle.Tensor
) -> paddle.Tensor:
    """Rotary embedding of x [b, s, heads, dim] from tables cos, sin [positions, dim] at position_ids [b, s]."""
    batch, length, num_heads, dim = x.shape
    ids = position_ids.expand([batch, length]).reshape([-1, 1])
    ids = paddle.concat([ids] * num_heads, axis=1).reshape([-1])
    shape = [batch, length, num_heads, dim]
    cos, sin = paddle.gather(cos, ids).reshape(shape), paddle.gather(sin, ids).reshape(shape)
    return Rotation.apply(x, cos, sin, _half_turn(dim))


def install_llama() -> None:
    """Puts the forms above into PaddleNLP's Llama, for this process; doing it twice does no more than once."""
    from paddlenlp.transformers.llama import modeling

    if getattr(modeling.LlamaRMSNorm.forward, "__module__", None) == __name__:
        return
    stock_norm = modeling.LlamaRMSNorm.forward
    stock_rotary, stock_attention = modeling.apply_rotary_pos_emb, modeling.scaled_dot_product_attention
    stock_swiglu = modeling.swiglu

    def norm(self: Any, hidden_states: paddle.Tensor) -> paddle.Tensor:
        if not _covers(hidden_states, self.weight):
            return stock_norm(self, hidden_states)
        return RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)

    def rotary(q: Any, k: Any, cos: Any, sin: Any, position_ids: Any) -> tuple[paddle.Tensor, paddle.Tensor]:
        if position_ids is None or not _covers(q, k, cos):
            pair: tuple[paddle.Tensor, paddle.Tensor] = stock_rotary(q, k, cos, sin, position_ids)
            return pair
        cos, sin = cos.squeeze(axis=[0, 2]), sin.squeeze(axis=[0, 2])
        return rotate(q, cos, sin, position_ids), rotate(k, cos, sin, position_ids)

    def scaled_attention(
        query: Any,
        config: Any,
        key: Any,
        value: Any,
        mask: Any,
        output_attentions: bool,
        *rest: Any,
        **more: Any,
    ) -> Any:
        plain = (
            mask is not None
            and not any(rest)
            and not any(more.get(name) is not None for name in _NOT_COVERED)
        )
        plain = plain and not config.use_flash_attention and not more.get("sequence_parallel")
        if not plain or config.context_parallel_degree > 1 or not _covers(query, key, value, mask):
            return stock_attention(query, config, key, value, mask, output_attentions, *rest, **more)
        output, weights = attention(
            query, key, value, mask.reshape([query.shape[0], -1, query.shape[1], key.shape[1]])
        )
        return (output, weights) if output_attentions else output

    def swiglu(gate: Any, up: Any = None) -> paddle.Tensor:
        return stock_swiglu(gate, up) if up is None or not _covers(gate, up) else SwiGLU.apply(gate, up)

    replace(modeling.LlamaRMSNorm, "forward", norm)
    replace(modeling, "apply_rotary_pos_emb", rotary)
    replace(modeling, "scaled_dot_product_attention", scaled_attention)
    replace(modeling, "swiglu", swiglu)


_NOT_COVERED = ("alibi", "attn_mask_startend_row_indices", "reshard_layer")


def _covers(*tensors: paddle.Tensor) -> bool:
    """True for float32 tensors on CPU outside a static graph."""
    return paddle.in_dynamic_mode() and all(
        tensor.dtype == paddle.float32 and tensor.place.is_cpu_place() for tensor in tensors
    )


_row_orders: dict[tuple[int, int, int], paddle.Tensor] = {}
_half_turns: dict[int, paddle.Tensor] = {}


def _swapped_rows(batch: int, m: int, n: int) -> paddle.Tensor:
    """Row numbers that turn [batch, m, n] rows into [batch, n, m] order."""
    key = (batch, m, n)
    if key not in _row_orders:
        if len(_row_orders) >= 64:  # lengths vary from batch to batch; the tables are small but not free
            _row_orders.clear()
        _row_orders[key] = (
            paddle.arange(batch * m * n).reshape([batch, m, n]).transpose([0, 2, 1]).reshape([-1])
        )
    return _row_orders[key]


def _half_turn(dim: int) -> paddle.Tensor:
    """The matrix R with x @ R = concat(-x[dim/2:], x[:dim/2]); each product has one term, so it is exact."""
    if dim not in _half_turns:
        upper = paddle.eye(dim // 2)
        zero = paddle.zeros_like(upper)
        _half_turns[dim] = paddle.concat(
            [paddle.concat([zero, upper], 1), paddle.concat([-upper, zero], 1)], 0
        )
    return _half_turns[dim]
