"""A feed-forward layer of experts, of which each token passes a few.

A router gives every token one logit per expert. Softmax of these in float32, the largest few, and where the facts say
so divided by their sum, are the shares with which the outputs of these experts are added (Shazeer et al. 2017;
Jiang et al., "Mixtral of Experts", 2024; Qwen2-MoE adds an expert for all tokens behind a sigmoid gate).

Tokens are sorted by expert, so that each expert sees its tokens as one matrix; how many those are the host reads once
per layer. Every rank of a tensor-parallel group routes all tokens and holds a slice of every expert; under sequence
parallelism the rows are put together before and divided after, so that all ranks route alike.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.distributed.fleet.utils.sequence_parallel_utils import GatherOp, ScatterOp

from finetune.families.expert_facts import ExpertFacts
from finetune.families.head_facts import HeadFacts
from finetune.families.head_layers import GatedFeedForward


class RoutingObserver(Protocol):
    """Something that sees how tokens are routed, and may hand gradients to the router."""

    def see(self, probabilities: Any, chosen: Any) -> Any:
        """The probabilities that go on, equal to those given.

        Args:
            probabilities: float32 [tokens, experts].
            chosen: int64 [tokens, chosen], experts of each token.
        """
        ...


class ExpertFeedForward(nn.Layer):
    """The experts of one decoder layer, their router, and what every token passes beside them.

    Args:
        config: Sizes and degrees of parallelism.
        facts: Of the decoder; with experts.
    """

    def __init__(self, config: Any, facts: HeadFacts):
        super().__init__()
        experts = facts.experts
        if experts is None:
            raise ValueError("these facts know no experts")
        self.experts_facts: ExpertFacts = experts
        self.rows_divided = bool(config.sequence_parallel)
        hidden = config.hidden_size
        self.gate = nn.Linear(hidden, experts.num_routed, bias_attr=False)
        inner = _inner_config(config, experts.inner_size)
        self.experts = nn.LayerList(GatedFeedForward(inner, facts) for _ in range(experts.num_routed))
        if experts.shared_size:
            self.shared_expert = GatedFeedForward(_inner_config(config, experts.shared_size), facts)
            self.shared_expert_gate = nn.Linear(hidden, 1, bias_attr=False)
        # Set from outside where somebody wants to know, such as a loss that balances the experts.
        self.observer: RoutingObserver | None = None
        # While an expert computes: the numbers of the tokens that it got, int64 [its tokens], and how many there are
        # in all. Dropout asks, as its masks follow tokens.
        self.passed_tokens: tuple[Any, int] | None = None

    def forward(self, x: Any) -> Any:
        """[..., hidden] -> the same shape."""
        whole = GatherOp.apply(x) if self.rows_divided else x
        tokens = whole.reshape([-1, whole.shape[-1]])  # [tokens, hidden]
        output = self._routed(tokens)
        if self.experts_facts.shared_size:
            share = F.sigmoid(self.shared_expert_gate(tokens))  # [tokens, 1]
            output = output + share * self.shared_expert(tokens)
        output = output.reshape(whole.shape)
        return ScatterOp.apply(output) if self.rows_divided else output

    def _routed(self, tokens: Any) -> Any:
        """What the chosen experts give, [tokens, hidden]."""
        shares, chosen = self._route(tokens)
        num_chosen = self.experts_facts.num_chosen
        flat = chosen.flatten()  # [tokens * chosen]
        order = paddle.argsort(flat, stable=True)
        counts = paddle.bincount(flat, minlength=self.experts_facts.num_routed).tolist()
        numbers = order // num_chosen  # [tokens * chosen], sorted by expert
        sizes = [count for count in counts if count]
        pieces = zip(paddle.split(tokens.gather(numbers), sizes), paddle.split(numbers, sizes), strict=True)
        busy = [expert for expert, count in zip(self.experts, counts, strict=True) if count]
        outputs = [
            self._pass(expert, piece, own, tokens.shape[0])
            for expert, (piece, own) in zip(busy, pieces, strict=True)
        ]
        given = paddle.concat(outputs).gather(paddle.argsort(order))  # in the order of the tokens again
        given = given.reshape([-1, num_chosen, given.shape[-1]])
        output = (given * shares.astype(given.dtype).unsqueeze(-1)).sum(1)
        if self.training and paddle.is_grad_enabled():
            idle = [expert for expert, count in zip(self.experts, counts, strict=True) if not count]
            output = self._with_zero_gradients(output, idle, tokens)
        return output

    def _pass(self, expert: Any, piece: Any, numbers: Any, num_tokens: int) -> Any:
        """What an expert gives for its tokens."""
        self.passed_tokens = (numbers, num_tokens)
        try:
            return expert(piece)
        finally:
            self.passed_tokens = None

    def _with_zero_gradients(self, output: Any, idle: list[Any], tokens: Any) -> Any:
        """The same output, from which experts without tokens get a gradient of zero.

        Which experts have none differs between micro-batches and replicas; all of them sum and update the same weights.
        """
        first = paddle.zeros([1], dtype="int64") if idle else None
        for expert in idle:
            output = output + self._pass(expert, tokens[:1], first, tokens.shape[0]) * 0.0
        return output

    def _route(self, tokens: Any) -> tuple[Any, Any]:
        """Shares [tokens, chosen], float32, and experts [tokens, chosen]."""
        logits = self.gate(tokens)
        with paddle.amp.auto_cast(enable=False):
            probabilities = F.softmax(logits.astype("float32"), axis=-1)  # [tokens, experts]
            chosen = paddle.topk(probabilities.detach(), self.experts_facts.num_chosen, axis=-1)[1]
            if self.observer is not None:
                probabilities = self.observer.see(probabilities, chosen)
            shares = paddle.take_along_axis(probabilities, chosen, axis=1)
            if self.experts_facts.normalised:
                shares = shares / shares.sum(-1, keepdim=True)
        return shares, chosen


def _inner_config(config: Any, inner_size: int) -> Any:
    """Sizes of an expert; its rows are whole, and its layers stand apart as they do in all files."""
    inner = copy.copy(config)
    inner.intermediate_size, inner.sequence_parallel, inner.fuse_attention_ffn = inner_size, False, False
    return inner
