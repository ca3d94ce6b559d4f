"""The layout that a run asks for, compared with its model and method before any process meets another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from finetune.processes.layout import Layout

if TYPE_CHECKING:
    from finetune.families.family import Family
    from finetune.settings.arguments import Arguments

_MOST_ROWS = 16


def _layer_faults(family: Family, args: Arguments) -> list[str]:
    """What no other layout would mend."""
    faults = []
    if args.training.sequence_parallel and not family.sequence_parallel:
        faults.append(
            f"sequence_parallel is true, but the layers of family {family.name} cannot split rows: "
            "set it to false; recompute saves memory, too"
        )
    if args.model.use_flash_attention and args.data.zero_padding and family.fused_packing == "refused":
        faults.append(
            "use_flash_attention and zero_padding are both true, but nothing keeps packed samples apart in the fused "
            f"attention of family {family.name}: set one of them to false"
        )
    return faults


def nearest_layouts(
    wanted: Layout, fits: Callable[[Layout], bool], *, sharded: bool, limit: int = 3
) -> list[Layout]:
    """Layouts of as many processes that satisfy `fits`, the nearest to `wanted` first.

    Near means few doublings and halvings of degrees; that a rank still holds as little of the model
    counts most, because that is what the degrees are raised for.

    Args:
        wanted: What was asked for.
        fits: Whether a layout can be used.
        sharded: Whether the sharding axis may be longer than 1.
        limit: Most layouts to return.
    """
    world = wanted.world
    found = [
        Layout(data=world // (tensor * pipeline * shards), pipeline=pipeline, sharding=shards, tensor=tensor)
        for tensor in _divisors(world)
        for pipeline in _divisors(world // tensor)
        for shards in (_divisors(world // (tensor * pipeline)) if sharded else [1])
    ]
    found.sort(key=lambda layout: (_distance(layout, wanted), -layout.tensor, layout.data))
    # Lazily: a large world has many layouts, and three are enough.
    fitting = (layout for layout in found if fits(layout))
    return [layout for layout, _ in zip(fitting, range(limit), strict=False)]


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _distance(layout: Layout, wanted: Layout) -> float:
    def doublings(now: int, then: int) -> float:
        return abs(math.log2(now / then))

    distance = doublings(layout.tensor, wanted.tensor) + doublings(layout.pipeline, wanted.pipeline)
    distance += 2 * doublings(layout.tensor * layout.pipeline, wanted.tensor * wanted.pipeline)
    distance += 0.5 * doublings(layout.sharding, wanted.sharding)
    return round(distance, 9)  # so that equally far layouts tie whatever the rounding of the sum


def nearest_line(num_processes: int, nearest: Sequence[Layout]) -> str:
    """What `nearest_layouts` found, as a sentence for the person."""
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    if not nearest:
        return f"no layout of {processes} fits this model and method: start another number of processes"
    return f"layouts of {processes} that fit, the nearest first: {'; '.join(map(str, nearest))}"


def describe_layout(
    layout: Layout,
    parameters_per_rank: Sequence[int] | None = None,
    updated_per_rank: Sequence[int] | None = None,
) -> str:
    """A table of where every rank stands; long ones are shortened in the middle.

    Args:
        layout: The degrees.
        parameters_per_rank: Number of parameters that each rank holds, by rank.
        updated_per_rank: Number of those of which it keeps optimizer state.
    """
    header = ["rank", "data", "pipeline", "sharding", "tensor"]
    counts = {"parameters": parameters_per_rank, "updated": updated_per_rank}
    header += [name for name, per_rank in counts.items() if per_rank]
    rows = [header]
    ranks = range(layout.world)
    shown = list(ranks) if layout.world <= _MOST_ROWS else [*ranks[: _MOST_ROWS - 1], ranks[-1]]
    for rank in shown:
        place = layout.coordinates(rank)
        row = [str(number) for number in (rank, place.data, place.pipeline, place.sharding, place.tensor)]
        row += [_format_count(per_rank[rank]) for per_rank in counts.values() if per_rank]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    if len(shown) < layout.world:
        lines.insert(-1, f"{'...':>{widths[0]}}  ({layout.world - len(shown)} more ranks)")
    processes = "1 process" if layout.world == 1 else f"{layout.world} processes"
    return "\n".join([f"Layout of {processes}: {layout}", *(f"  {line}" for line in lines)])


def _format_count(number: int) -> str:
    return f"{number / 1e6:,.2f} M ({number:,})" if number >= 1_000_000 else f"{number:,}"
