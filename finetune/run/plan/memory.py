"""The memory of each rank, by part, at the two moments of a step at which it is highest.

While the backward pass of a micro-batch runs, what layers kept goes and gradients come. Both shrink and grow layer by
layer, so that the most is needed at one of the ends:

    the end of the forward pass     weights, optimizer state, gradients of earlier micro-batches, everything kept, logits
    the end of the backward pass    weights, optimizer state, all gradients, what one layer works with

Optimizer state (two moments, and float32 masters of half-precision weights) exists from the first update on. What the
stages of sharding divide is told in Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models" (2020); what a rank really holds here follows the engines of `finetune.parallel.sharding`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune.adapters.trained_shapes import TrainedShapes, number_of
from finetune.families.family import Family
from finetune.parallel.sharding.owners import deal_out
from finetune.processes.layout import Layout
from finetune.run.plan.activations import Activations, MicroBatch, most_in_flight
from finetune.run.plan.facts import FLOAT_BYTES, HALF_BYTES, MemoryFacts
from finetune.run.plan.rank_parts import StageParts, layer_number

EXCHANGE_BYTES = 2 * (32 << 20)
"""Two buckets in which gradients or weights travel between replicas."""
GPU_RUNTIME_BYTES = 1 << 30
"""The driver's context and the libraries' own memory on a card; an assumption, as no card was at hand to measure it."""
_MOMENT_BYTES = 8


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        forward: By part, at the end of the forward pass.
        backward: By part, at the end of the backward pass.
    """

    forward: Mapping[str, float] = field(default_factory=dict)
    backward: Mapping[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """The most at once."""
        return max(sum(self.forward.values()), sum(self.backward.values()))


class MemoryPlan:
    """Memory of the ranks of a layout.

    Args:
        shapes: Parameters, and which are trained.
        family: Record of the model.
        layout: Degrees of parallelism.
        facts: The run's settings.
        activations: Of its layers.
    """

    def __init__(
        self,
        shapes: TrainedShapes,
        family: Family,
        layout: Layout,
        facts: MemoryFacts,
        activations: Activations,
    ):
        self.shapes, self.family, self.layout = shapes, family, layout
        self.facts, self.activations = facts, activations

    def stage(self, parts: StageParts, batch: MicroBatch) -> RankMemory:
        """The memory of the fullest rank of a pipeline stage.

        Args:
            parts: What the stage holds.
            batch: The micro-batch that needs most.
        """
        held = self._held(parts)
        kept, logits, working = self._kept(parts, batch)
        gradients = self._gradients(parts)
        repeats = self.facts.num_micro_batches > 1
        forward = held | {
            "gradients": gradients if repeats else 0.0,
            "activations": kept + max(0.0, working - logits),
            "logits and loss": logits,
        }
        backward = held | {"gradients": gradients, "activations": working, "logits and loss": 0.0}
        return RankMemory(forward, backward)

    def updated(self, parts: StageParts) -> list[int]:
        """How many elements each rank of the sharding group keeps optimizer state of."""
        degree, sizes = self.layout.sharding, {name: parts.sizes[name] for name in parts.trained}
        if degree == 1 or self.facts.sharding == 0:
            return [sum(sizes.values())] * degree
        if self._deals:
            owners = deal_out(sizes, degree, parts.shared)
            return [sum(sizes[name] for name in sizes if owners[name] == rank) for rank in range(degree)]
        return [sum(-(-size // degree) for size in sizes.values())] * degree

    @property
    def _deals(self) -> bool:
        return self.facts.sharding == 1 and not self.facts.slices

    @property
    def _degree(self) -> int:
        """Ranks over which sharding divides."""
        return self.layout.sharding if self.facts.sharding else 1

    def _held(self, parts: StageParts) -> dict[str, float]:
        facts = self.facts
        updated = max(self.updated(parts))
        is_half = facts.adapter_half if self.shapes.added else facts.stores_half
        return {
            "weights": self._weights(parts),
            "master weights": float(FLOAT_BYTES * updated) if is_half else 0.0,
            "optimizer moments": float(_MOMENT_BYTES * updated),
            "buffers": self._buffers(parts),
        }

    def _weights(self, parts: StageParts) -> float:
        whole = sum(self._bytes_of(name, size) for name, size in parts.sizes.items())
        if self._degree == 1 or self._deals:
            return whole
        trained = sum(self._bytes_of(name, parts.sizes[name]) for name in parts.trained)
        if self.facts.sharding < 3:  # slices of what is trained, beside the whole
            return whole + trained / self._degree
        # What stands outside the layers is gathered as long as a micro-batch lasts, and so are two layers at a time.
        frame = sum(self._bytes_of(name, size) for name, size in parts.sizes.items() if self._is_frame(name))
        layers: dict[int | None, float] = {}
        for name, size in parts.sizes.items():
            if not self._is_frame(name):
                number = layer_number(name)
                layers[number] = layers.get(number, 0.0) + self._bytes_of(name, size)
        return whole / self._degree + frame + 2 * max(layers.values(), default=0.0)

    def _is_frame(self, name: str) -> bool:
        return layer_number(name) is None or name.startswith("prefix_encoder.")

    def _bytes_of(self, name: str, size: int) -> float:
        if name in self.shapes.added:
            return size * self.facts.trained_bytes
        if self.facts.linear_bytes is not None and self._is_linear(name):
            return size * self.facts.linear_bytes
        return float(size * self.facts.weight_bytes)

    def _is_linear(self, name: str) -> bool:
        return layer_number(name) is not None and len(self.shapes.model[name]) == 2

    def _gradients(self, parts: StageParts) -> float:
        element = self.facts.trained_bytes if self.shapes.added else self.facts.weight_bytes
        if self.facts.master_gradients:
            element = FLOAT_BYTES
        whole = parts.num_trained * element
        if self.facts.sharding < 2 or self._degree == 1:
            return float(whole)
        return whole / self._degree

    def _buffers(self, parts: StageParts) -> float:
        facts = self.facts
        total = float(sum(map(number_of, self.shapes.shared)) * facts.trained_bytes)
        total += parts.num_layers * self.activations.table_bytes
        if self.layout.data_world > 1 or self._degree > 1:
            total += EXCHANGE_BYTES
        linear = [
            size for name, size in parts.sizes.items() if name in self.shapes.model and self._is_linear(name)
        ]
        if facts.linear_bytes is not None and linear:
            total += max(linear) * facts.compute_bytes  # unpacked for a product
        if facts.computes_half and not facts.stores_half:
            total += sum(linear) * HALF_BYTES  # copies that autocast makes for products
        if facts.device != "cpu":
            total += GPU_RUNTIME_BYTES
        return total

    def _kept(self, parts: StageParts, batch: MicroBatch) -> tuple[float, float, float]:
        """What all micro-batches in flight keep, the logits of one, and the most that a layer works with."""
        activations, plan = self.activations, parts.plan
        chunks = [
            sum(activations.kept(number, batch) for number in chunk if self._is_passed(number))
            for chunk in parts.chunks
        ]
        kept = most_in_flight(
            chunks,
            num_ranks=plan.num_ranks,
            rank=plan.rank,
            num_micro_batches=self.facts.num_micro_batches,
        )
        mask = batch.rows * batch.length**2 * (1 + FLOAT_BYTES) if self.facts.dense_mask else 0
        kept += mask + (activations.ends(batch) if plan.holds_last else activations.hidden(batch))
        logits = activations.logits(batch) if plan.holds_last else 0.0
        numbers = [number for chunk in parts.chunks for number in chunk]
        working = max((activations.working(number, batch) for number in numbers), default=0.0)
        return kept, logits, max(working, activations.attending(batch))

    def _is_passed(self, number: int) -> bool:
        """Whether a backward pass comes to a layer: below the first trained one none does."""
        return number >= self._first_trained

    @functools.cached_property
    def _first_trained(self) -> int:
        numbers = [layer_number(name) for name in self.shapes.updated]
        inside = [number for number in numbers if number is not None]
        outside = [name for name in self.shapes.updated if layer_number(name) is None]
        heads = (self.family.embedding_module, *self.family.entry_modules)
        if any(set(heads) & set(name.split(".")) for name in outside) or self.shapes.num_prefix_tokens:
            return 0
        return min(inside, default=1 << 30)
