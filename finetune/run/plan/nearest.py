"""The smallest changes of a run by which it fits a card.

Changes that leave the curve as it is come first (recomputation, smaller micro-batches, sharding, another layout of as
many cards), then half precision, then adapters, which train something else. A change costs the more the more it alters;
what is found is cheapest first, and none contains another that fits already.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.processes.layout import Layout
from finetune.processes.topology import nearest_layouts
from finetune.run.layout import check_topology
from finetune.run.plan.activations import MicroBatch
from finetune.run.plan.facts import facts_of
from finetune.run.plan.run_plan import ModelPlan, plan_memory, plan_model

if TYPE_CHECKING:
    from finetune.models.resolve import ResolvedModel
    from finetune.run.plan.run_plan import RunPlan
    from finetune.settings.arguments import Arguments

_MOST_FOUND = 4
_MOST_OF_MORE = 2
_MOST_LAYOUTS = 6
_MOST_CARDS = 64
_STAGES = ("stage1", "stage2", "stage3")
_SPREADS = "sharding"


@dataclass(frozen=True)
class Change:
    """A way to a smaller run.

    Attributes:
        settings: Name -> value.
        num_cards: Of the run.
        peak: Bytes of the fullest card with it.
        cost: How much it alters.
    """

    settings: Mapping[str, Any]
    num_cards: int
    peak: float
    cost: float


def find_changes(args: Arguments, resolved: ResolvedModel, plan: RunPlan, limit: float) -> list[Change]:
    """Changes by which a run needs no more than a limit, cheapest first; empty when there is none.

    Args:
        args: Settings of the run.
        resolved: Its model.
        plan: Its plan.
        limit: Bytes of a card.
    """
    search = _Search(args, resolved, plan)
    found = search.find(limit, plan.layout.world)
    num_cards = plan.layout.world
    more: list[Change] = []
    # Where only another method fits, more cards for this one are worth knowing, too.
    while not (more or any(_keeps_method(each.settings) for each in found)) and num_cards < _MOST_CARDS:
        num_cards *= 2
        more = [each for each in search.find(limit, num_cards) if _keeps_method(each.settings)][
            :_MOST_OF_MORE
        ]
    return [*found, *more]


def _keeps_method(settings: Mapping[str, Any]) -> bool:
    return not {"lora", "weight_quantize_algo"} & set(settings)


class _Search:
    """Tries changes; what parameters a method has is worked out once."""

    def __init__(self, args: Arguments, resolved: ResolvedModel, plan: RunPlan):
        self._args, self._resolved, self._plan = args, resolved, plan
        self._models: dict[tuple[Any, ...], ModelPlan] = {}

    def find(self, limit: float, num_cards: int) -> list[Change]:
        found: list[Change] = []
        for cost, settings, layout in self._candidates(num_cards):
            known = [each.settings for each in found]
            if any(each.items() <= settings.items() or set(each) == set(settings) for each in known):
                continue
            peak = self._peak(settings, layout)
            if peak is not None and peak <= limit:
                found.append(Change(settings, num_cards, peak, cost))
                if len(found) == _MOST_FOUND:
                    break
        return found

    def _candidates(self, num_cards: int) -> Iterator[tuple[float, dict[str, Any], Layout]]:
        """Combinations of changes, cheapest first."""
        options = itertools.product(
            self._layouts(num_cards),
            self._recomputing(),
            self._batches(),
            self._precisions(),
            self._methods(),
        )
        whole = []
        for parts in options:
            layout = parts[0][2]
            settings = {name: value for _, changes, *_ in parts for name, value in changes.items()}
            if settings or num_cards != self._plan.layout.world:
                whole.append((sum(part[0] for part in parts), settings, layout))
        whole.sort(key=lambda each: (each[0], len(each[1])))
        yield from whole

    def _layouts(self, num_cards: int) -> list[tuple[float, dict[str, Any], Layout]]:
        wanted, chunks = self._plan.layout, self._args.model.virtual_pp_degree
        start = dataclasses.replace(wanted, data=num_cards // (wanted.world // wanted.data))
        if start.world != num_cards:
            start = Layout(data=num_cards)
        found: list[tuple[float, dict[str, Any], Layout]] = [
            (0.0 if start.world == wanted.world else 0.5, {}, start)
        ]
        others = nearest_layouts(start, lambda each: self._fits_model(each, chunks), sharded=True, limit=64)
        for layout in others[: _MOST_LAYOUTS * 4]:
            moved = self._distance(layout, start)
            changes: dict[str, Any] = {}
            for axis, name in (
                ("tensor", "tensor_parallel_degree"),
                ("pipeline", "pipeline_parallel_degree"),
            ):
                if getattr(layout, axis) != getattr(wanted, axis):
                    changes[name] = getattr(layout, axis)
            stages: tuple[str, ...] = ("",) if layout.sharding == 1 else _STAGES
            for number, stage in enumerate(stages):
                own = dict(changes)
                if stage and self._args.training.sharding != stage:
                    own[_SPREADS] = stage
                if layout.sharding != wanted.sharding:
                    own["sharding_parallel_degree"] = layout.sharding
                if own and (moved or own.get(_SPREADS)):
                    found.append((moved + 0.5 + 0.5 * number, own, layout))
        return found

    def _fits_model(self, layout: Layout, chunks: int) -> bool:
        changed = self._changed({}, layout)
        changed.model.virtual_pp_degree = chunks
        try:
            check_topology(layout, self._resolved, changed)
        except UserError:
            return False
        return True

    @staticmethod
    def _distance(layout: Layout, start: Layout) -> float:
        axes = ((layout.tensor, start.tensor), (layout.pipeline, start.pipeline))
        return sum(2.0 * abs(now.bit_length() - then.bit_length()) for now, then in axes)

    def _recomputing(self) -> list[tuple[float, dict[str, Any]]]:
        training, model = self._args.training, self._args.model
        if training.recompute and model.recompute_granularity == "full":
            return [(0.0, {})]
        change: dict[str, Any] = {"recompute": True}
        if model.recompute_granularity != "full":
            change["recompute_granularity"] = "full"
        return [(0.0, {}), (1.0, change)]

    def _batches(self) -> list[tuple[float, dict[str, Any]]]:
        """Micro-batches of half the size, twice as many."""
        size = int(self._args.training.per_device_train_batch_size)
        steps = int(self._args.training.gradient_accumulation_steps)
        found: list[tuple[float, dict[str, Any]]] = [(0.0, {})]
        halvings = 0
        while size % 2 == 0 and size > 1:
            size, steps, halvings = size // 2, steps * 2, halvings + 1
            sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
            found.append((0.75 + 0.25 * halvings, sizes))
        return found

    def _precisions(self) -> list[tuple[float, dict[str, Any]]]:
        training = self._args.training
        is_stored_half = (training.bf16 or training.fp16) and training.fp16_opt_level == "O2"
        if self._plan.facts.device == "cpu" or is_stored_half:
            return [(0.0, {})]
        change: dict[str, Any] = {"fp16_opt_level": "O2"}
        if not training.fp16:
            change["bf16"] = True
        return [(0.0, {}), (2.5, change)]

    def _methods(self) -> list[tuple[float, dict[str, Any]]]:
        model = self._args.model
        found: list[tuple[float, dict[str, Any]]] = [(0.0, {})]
        if model.prefix_tuning or (
            self._plan.model.shapes.model != self._plan.model.shapes.all and not model.lora
        ):
            return found
        if not model.lora:
            found.append((6.0, {"lora": True}))
        if self._plan.facts.linear_bytes is None:
            change = {"lora": True} if not model.lora else {}
            found.append((8.0 if not model.lora else 4.0, change | {"weight_quantize_algo": "nf4"}))
        return found

    def _peak(self, settings: Mapping[str, Any], layout: Layout) -> float | None:
        """Bytes with these changes; None where they do not go together."""
        args = self._changed(settings, layout)
        facts = facts_of(args, self._resolved)
        if args.training.sequence_parallel and layout.tensor == 1:
            return None
        key = (bool(args.model.lora), args.model.weight_quantize_algo)
        try:
            if key not in self._models:
                self._models[key] = plan_model(args, self._resolved)
            stages, _ = plan_memory(self._models[key], self._resolved, layout, facts, self._shrunk(args))
        except UserError:
            return None
        return max(stage.memory.peak for stage in stages)

    def _shrunk(self, args: Arguments) -> tuple[MicroBatch, ...]:
        """The largest micro-batches in the size that a change leaves them; of a smaller one the longest row stays."""
        before = int(self._args.training.per_device_train_batch_size)
        now = int(args.training.per_device_train_batch_size)
        if now == before:
            return self._plan.batches.largest
        share = now / before
        return tuple(
            MicroBatch(max(1, round(each.rows * share)), each.length, max(1, round(each.labels * share)))
            for each in self._plan.batches.largest
        )

    def _changed(self, settings: Mapping[str, Any], layout: Layout) -> Arguments:
        args = dataclasses.replace(
            self._args,
            model=copy.copy(self._args.model),
            training=copy.copy(self._args.training),
        )
        args.training.tensor_parallel_degree, args.training.pipeline_parallel_degree = (
            layout.tensor,
            layout.pipeline,
        )
        for name, value in settings.items():
            setattr(args.model if hasattr(args.model, name) else args.training, name, value)
        return args


def fitting(plan: RunPlan, limit: float | None) -> bool:
    """Whether every card has room."""
    return limit is None or plan.peak <= limit
