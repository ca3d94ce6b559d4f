"""What a rank keeps of micro-batches between their forward and their backward pass.

For a layer with counts (a, q, k, f, s) of `LayerMemory`, B rows of S tokens, T = B S, hidden size h, widths Q, K of all
queries and keys, feed-forward width F, H heads, M keys (S and a prefix), tensor-parallel degree t, e bytes an element:

    T e (a h + (q Q + k K + f F) / t) + 4 T h (norms, in half precision) + s B (H / t) S M b

with b = 4 bytes in float32 and 6 in half precision, where the probabilities stand in both types. The counts were taken
on built models (docs/memory.md). With recomputation a layer keeps its input and one layer at a time has the rest
(Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016); what sequence parallelism divides is told in
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.adapters.trained_shapes import TrainedShapes
from finetune.families.family import Family
from finetune.families.layer_memory import LayerMemory, passed_experts
from finetune.run.plan.facts import FLOAT_BYTES, HALF_BYTES, MemoryFacts
from finetune.run.plan.rank_parts import layer_number

_LOSS_BYTES = 8  # a logit in float32 and its probability
_MAGNITUDE = "lora_magnitude"
_KRONECKER = (("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a"))
_GATHERED = 2  # tensors of hidden size that sequence parallelism keeps whole


@dataclass(frozen=True)
class MicroBatch:
    """The shape of a forward pass.

    Attributes:
        rows: Of it.
        length: Tokens of each row, padding included.
        labels: Positions whose logits are computed.
    """

    rows: int
    length: int
    labels: int

    @property
    def tokens(self) -> int:
        """Positions of all rows."""
        return self.rows * self.length


@dataclass(frozen=True)
class Widths:
    """Sizes of a model's layers, in elements.

    Attributes:
        hidden: Of hidden states.
        query: Of all queries of a token.
        key_value: Of all keys of a token.
        heads: Of the queries.
        head_dim: Size of a head.
        vocabulary: Rows of the embedding.
        positions: Of the model.
        memory: What each layer keeps.
        inner: For each layer, what its feed-forward layers are wide for a token: of experts all that a token passes.
        expert_hidden: For each layer, further tensors of hidden size of its experts.
        updates: For each layer, what its low-rank updates keep for a token.
    """

    hidden: int
    query: int
    key_value: int
    heads: int
    head_dim: int
    vocabulary: int
    positions: int
    memory: LayerMemory
    inner: tuple[int, ...]
    expert_hidden: tuple[int, ...]
    updates: tuple[int, ...] = ()


def widths_of(family: Family, config: Mapping[str, Any], shapes: TrainedShapes) -> Widths:
    """The sizes of a model with this configuration, as the family adapts it."""
    geometry = family.prefix_geometry(config)
    num_layers, fields = geometry.num_layers, family.fields
    hidden = family.width(config)
    given = config.get(fields.inner_size or "") or (family.tiny.inner_ratio or 4) * hidden
    inner, more = [int(given) // fields.inner_parts] * num_layers, [0] * num_layers
    for number in range(num_layers):
        experts = passed_experts(f"{family.base_prefix}.layers.{number}", shapes.model, config)
        if experts is not None:
            inner[number], more[number] = experts
    return Widths(
        hidden=hidden,
        query=geometry.num_heads * geometry.head_dim,
        key_value=geometry.num_kv_heads * geometry.head_dim,
        heads=geometry.num_heads,
        head_dim=geometry.head_dim,
        vocabulary=int(config["vocab_size"]),
        positions=int(config.get(fields.max_positions) or 0),
        memory=family.layer_memory(config),
        inner=tuple(inner),
        expert_hidden=tuple(more),
        updates=tuple(_update_widths(shapes, num_layers)),
    )


def _update_widths(shapes: TrainedShapes, num_layers: int) -> list[int]:
    """What updates keep for a token: x A of LoRA, the scaled output of DoRA, x w2 of LoKr."""
    widths = [0] * num_layers
    for name, rank in shapes.adapted.items():
        number = layer_number(name)
        if number is None:
            continue
        widths[number] += rank
        if f"{name}.{_MAGNITUDE}" in shapes.added:
            widths[number] += shapes.model[f"{name}.weight"][1]
        first, second = (
            next((shapes.added[f"{name}.{end}"] for end in ends if f"{name}.{end}" in shapes.added), (0, 0))
            for ends in _KRONECKER
        )
        widths[number] += first[1] * second[0]
    return widths


class Activations:
    """Bytes that layers keep, and work with.

    Args:
        widths: Of its layers.
        facts: The run's settings.
        tensor_degree: Ranks that share a layer.
        num_prefix: Keys in front of every row.
    """

    def __init__(
        self,
        widths: Widths,
        facts: MemoryFacts,
        *,
        tensor_degree: int = 1,
        num_prefix: int = 0,
    ):
        self.widths, self.facts = widths, facts
        self._memory, self._degree, self._num_prefix = (
            widths.memory.on(facts.device),
            tensor_degree,
            num_prefix,
        )
        self._rows_divided = facts.sequence_parallel and tensor_degree > 1

    def layer(self, number: int, batch: MicroBatch) -> float:
        """What a layer keeps where nothing is recomputed."""
        return (
            self._stream(number, batch)
            + self._attention(batch)
            + self._inner(number, batch)
            + self._updates(number, batch)
            + self.scores(batch)
        )

    def scores(self, batch: MicroBatch) -> float:
        """What stands for each pair of a query and a key; with fused attention, what stands for each query."""
        heads = batch.rows * batch.length * self.widths.heads / self._degree
        if self.facts.fused_attention and self.facts.device != "cpu":
            return heads * FLOAT_BYTES
        each = FLOAT_BYTES + (HALF_BYTES if self.facts.computes_half else 0)
        return self._memory.scores * heads * (batch.length + self._num_prefix) * each

    def kept(self, number: int, batch: MicroBatch) -> float:
        """What a layer keeps with the run's recomputation."""
        facts = self.facts
        if not facts.recompute or number in facts.kept_layers:
            return self.layer(number, batch)
        if facts.recompute == "full":
            return self.hidden(batch)
        if facts.recompute == "full_attn":
            return self._stream(number, batch) + self._inner(number, batch)
        return self.layer(number, batch) - self.scores(batch)

    def working(self, number: int, batch: MicroBatch) -> float:
        """What a layer's backward pass takes beside what layers keep: what it computes again, and gradients."""
        again = self.layer(number, batch) - self.kept(number, batch)
        element = self.facts.compute_bytes
        gradients = (
            batch.tokens * element * (2 * self.widths.hidden + 3 * self.widths.inner[number] / self._degree)
        )
        return again + gradients

    def attending(self, batch: MicroBatch) -> float:
        """What stands for a moment while a layer without fused attention compares queries and keys."""
        if self.facts.fused_attention and self.facts.device != "cpu":
            return 0.0
        heads = batch.rows * self.widths.heads / self._degree
        return 2 * heads * batch.length * (batch.length + self._num_prefix) * FLOAT_BYTES

    def hidden(self, batch: MicroBatch) -> float:
        """Hidden states of a micro-batch, as they stand between layers."""
        rows = batch.tokens / (self._degree if self._rows_divided else 1)
        return rows * self.widths.hidden * self.facts.compute_bytes

    def ends(self, batch: MicroBatch) -> float:
        """What the norm behind the last layer and the output layer keep beside the logits."""
        wide = FLOAT_BYTES * batch.tokens * self.widths.hidden if self.facts.computes_half else 0
        return 3 * self.hidden(batch) + wide + batch.labels * self.widths.hidden * self.facts.compute_bytes

    def logits(self, batch: MicroBatch) -> float:
        """The most that logits and their loss take at once."""
        width = self.widths.vocabulary
        if width % self._degree == 0:
            width //= self._degree
        each = _LOSS_BYTES + (HALF_BYTES if self.facts.computes_half else 0)
        return batch.labels * width * each

    def _stream(self, number: int, batch: MicroBatch) -> float:
        count = self._memory.hidden + self.widths.expert_hidden[number]
        element, norms = self.facts.compute_bytes, self._memory.norms
        wide = FLOAT_BYTES * norms if self.facts.computes_half else 0
        each = count * element + wide
        if self._rows_divided:
            each = each / self._degree + _GATHERED * element
        return batch.tokens * self.widths.hidden * each

    def _attention(self, batch: MicroBatch) -> float:
        widths, memory = self.widths, self._memory
        width = memory.query * widths.query + memory.key_value * widths.key_value
        return batch.tokens * width * self.facts.compute_bytes / self._degree

    def _inner(self, number: int, batch: MicroBatch) -> float:
        return (
            batch.tokens
            * self._memory.inner
            * self.widths.inner[number]
            * self.facts.compute_bytes
            / self._degree
        )

    def _updates(self, number: int, batch: MicroBatch) -> float:
        widths = self.widths.updates
        width = widths[number] if widths else 0
        return batch.tokens * width * self.facts.compute_bytes / self._degree

    @property
    def table_bytes(self) -> int:
        """Tables of angles that each layer has for itself."""
        return self._memory.tables * self.widths.positions * self.widths.head_dim * FLOAT_BYTES


def most_in_flight(kept: Sequence[float], *, num_ranks: int, rank: int, num_micro_batches: int) -> float:
    """The most bytes that a rank of a pipeline keeps at once, in the schedules of Fleet's that drive it.

    A rank begins with as many forward passes as keep its successors busy, and from then on takes a forward and a
    backward pass in turn (1F1B: Narayanan et al., "PipeDream", 2019). With several chunks it goes through them with
    groups of as many micro-batches as there are ranks, the first group taking what is left over (Narayanan et al.,
    "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2021).

    Args:
        kept: What each of its chunks keeps of a micro-batch.
        num_ranks: Pipeline-parallel degree.
        rank: Which rank.
        num_micro_batches: Of a step.
    """
    num_chunks, num_ahead = len(kept), num_ranks - rank - 1
    if num_chunks == 1:
        return kept[0] * min(num_micro_batches, num_ahead + 1)
    # More micro-batches than fill the pipeline change nothing.
    rest = num_micro_batches % num_ranks
    num_passes = num_chunks * max(min(num_micro_batches, 4 * num_ranks + rest), num_ranks)
    first_group = num_ranks + rest

    def chunk_of(number: int) -> int:
        if number < first_group * num_chunks:
            return number // first_group
        return (number - first_group * num_chunks) % (num_ranks * num_chunks) // num_ranks

    num_begun = min(2 * num_ahead + (num_chunks - 1) * first_group, num_passes)
    now = most = sum(kept[chunk_of(number)] for number in range(num_begun))
    for number in range(num_begun, num_passes):
        now += kept[chunk_of(number)]
        most = max(most, now)
        now -= kept[num_chunks - 1 - chunk_of(number - num_begun)]
    return most
