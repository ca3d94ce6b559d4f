"""A feed-forward layer of experts in the exported graph; see `finetune.families.experts` for what it computes.

A graph stands still, and which experts tokens pass does not. So tokens are sorted by expert, and a loop inside the graph
goes over the experts that got some: each reads its own two matrices, and no expert without tokens is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import _C_ops, nn
from paddle.static.nn import while_loop

from finetune.families.decoder_description import ExpertWeights
from finetune.serving.export.linear_layer import LinearLayer, parameter


class ExpertLayer(nn.Layer):
    """Experts, their router, and the expert of all tokens where there is one.

    Args:
        experts: As described.
        dtype: Of the weights.
        activate: What stands between the two layers of an expert, [..., 2 x inner] -> [..., inner].
    """

    def __init__(self, experts: ExpertWeights, dtype: str, activate: Callable[[Any], Any]):
        super().__init__()
        self.size, self.num_chosen = experts.router.weight.shape[1], experts.num_chosen
        self.normalised, self.activate = experts.normalised, activate
        self.router = LinearLayer(experts.router, dtype)
        self.inner, self.outer = parameter(experts.inner, dtype), parameter(experts.outer, dtype)
        self.has_shared = experts.shared is not None
        if experts.shared is not None:
            self.shared_gate = LinearLayer(experts.shared.gate, dtype)
            self.shared_inner = LinearLayer(experts.shared.inner, dtype)
            self.shared_outer = LinearLayer(experts.shared.outer, dtype)

    def forward(self, x: Any) -> Any:
        """[B, S, hidden] -> the same shape."""
        tokens = x.flatten(0, 1)  # [tokens, hidden]
        shares, chosen = self._route(tokens)
        flat = chosen.flatten()  # [tokens * chosen]
        order = paddle.argsort(flat, stable=True)
        given = self._pass_experts(tokens.gather(order // self.num_chosen), flat)
        given = given.gather(paddle.argsort(order))  # in the order of the tokens again
        given = given.reshape([-1, self.num_chosen, tokens.shape[-1]])
        output = (given * shares.astype(given.dtype).unsqueeze(-1)).sum(1)
        if self.has_shared:
            share = F.sigmoid(self.shared_gate(tokens))  # [tokens, 1]
            output = output + share * self.shared_outer(self.activate(self.shared_inner(tokens)))
        return output.reshape(paddle.shape(x))

    def _route(self, tokens: Any) -> tuple[Any, Any]:
        """Shares [tokens, chosen], float32, and experts [tokens, chosen]."""
        probabilities = F.softmax(self.router(tokens).astype("float32"), axis=-1)  # [tokens, experts]
        shares, chosen = paddle.topk(probabilities, self.num_chosen, axis=-1)
        return shares / shares.sum(-1, keepdim=True) if self.normalised else shares, chosen

    def _pass_experts(self, rows: Any, flat: Any) -> Any:
        """What experts give for rows that are sorted by them, [tokens * chosen, hidden].

        Args:
            rows: [tokens * chosen, hidden].
            flat: The expert of each choice, in any order.
        """
        counts = F.one_hot(flat, self.size).sum(0).astype("int64")  # [experts]
        ends, busy = counts.cumsum(0), paddle.nonzero(counts).flatten()
        num_busy = paddle.shape(busy)[0].astype("int64")

        def must_continue(place: Any, _given: Any) -> Any:
            return place < num_busy

        def advance(place: Any, given: Any) -> list[Any]:
            expert = busy.gather(place.reshape([1]))  # [1]
            end = ends.gather(expert)
            begin = end - counts.gather(expert)
            own = paddle.slice(rows, [0], [begin], [end])
            inner = paddle.matmul(own, self.inner.gather(expert).squeeze(0))
            output = paddle.matmul(self.activate(inner), self.outer.gather(expert).squeeze(0))
            return [place + 1, _write_rows(given, output, begin, end)]

        return while_loop(must_continue, advance, [paddle.full([], 0, "int64"), paddle.zeros_like(rows)])[1]


def _write_rows(target: Any, rows: Any, begin: Any, end: Any) -> Any:
    """Puts rows into a matrix, in place."""
    return _C_ops.set_value_with_tensor_(  # type: ignore[attr-defined]
        target, rows, [begin], [end], [1], [0], [], []
    )
