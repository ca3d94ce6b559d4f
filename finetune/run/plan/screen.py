"""A plan on the screen, at most 80 columns wide, and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.machine.language.columns import count_columns, wrap
from finetune.reporting.progress import format_duration

if TYPE_CHECKING:
    from finetune.run.plan.nearest import Change
    from finetune.run.plan.run_plan import RunPlan

_GIBIBYTE = 1 << 30
_MOST_STAGES = 8
_MOST_ROWS = 16
_WIDTH = 80


def describe_plan(plan: RunPlan, *, free_bytes: int | None = None) -> Iterator[str]:
    """The lines of a plan.

    Args:
        plan: What is told.
        free_bytes: Of the disk that the run writes to; None where that is not known.
    """
    yield from _describe_size(plan)
    yield from _describe_course(plan)
    yield from _describe_memory(plan)
    yield from _describe_disk(plan, free_bytes)


def _describe_size(plan: RunPlan) -> Iterator[str]:
    model = plan.model
    share = model.num_trained / model.num_parameters
    yield f"Parameters: {model.num_parameters:,}, {model.num_trained:,} of them trained ({share:.2%})"
    if plan.layout.world > 1:
        yield f"Layout of {plan.layout.world} cards: {plan.layout}"
        yield from _layout_table(plan)


def _layout_table(plan: RunPlan) -> Iterator[str]:
    """Where every rank stands, and what it holds; long tables are shortened in the middle."""
    layout, world = plan.layout, plan.layout.world
    header = ["rank", "data", "pipeline", "sharding", "tensor", "M parameters", "M updated", "GiB"]
    held, updated = plan.held_per_rank(), plan.updated_per_rank()
    rows = [header]
    shown = list(range(world)) if world <= _MOST_ROWS else [*range(_MOST_ROWS - 1), world - 1]
    for rank in shown:
        place = layout.coordinates(rank)
        peak = plan.stages[place.pipeline].memory.peak
        axes = [str(number) for number in (rank, place.data, place.pipeline, place.sharding, place.tensor)]
        rows.append([*axes, f"{held[rank] / 1e6:,.2f}", f"{updated[rank] / 1e6:,.2f}", _gibibytes(peak)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        if number == _MOST_ROWS and len(shown) < world:
            yield f"  {'...':>{widths[0]}}  ({world - len(shown)} more)"
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _describe_course(plan: RunPlan) -> Iterator[str]:
    batches = plan.batches
    yield ""
    about = "about " if batches.is_estimate else ""
    epochs = (
        ""
        if batches.num_epochs is None
        else f" ({batches.num_epochs:.3g} epochs of {batches.steps_per_epoch:,})"
    )
    yield f"Steps: {batches.num_steps:,}{epochs}"
    what = "samples" if batches.num_rows == batches.num_samples else f"samples in {batches.num_rows:,} rows"
    if batches.steps_per_epoch is None:
        what += ", the first of a stream"
    yield f"Data: {batches.num_samples:,} {what}, the longest row of {batches.longest:,} tokens"
    yield f"Tokens: {about}{batches.num_tokens:,} in all; {batches.padding_share:.1%} of what is computed is padding"
    if plan.seconds is None:
        yield "Time: not known; give --tokens_per_second, or run a few steps: their speed is read from output_dir"
    else:
        speed = f"{plan.tokens_per_second:,.0f} tokens/s ({plan.speed_from})"
        yield f"Time: {about or 'about '}{format_duration(plan.seconds)} at {speed}"


def _describe_memory(plan: RunPlan) -> Iterator[str]:
    largest, stage = plan.largest, plan.fullest
    yield ""
    yield f"Memory of {'this process' if plan.facts.device == 'cpu' else 'a card'}, in GiB{_name_stage(plan)}:"
    yield f"  {'':<20}{'end of forward':>16}{'end of backward':>17}"
    memory = stage.memory
    for part in memory.forward:
        values = (memory.forward[part], memory.backward[part])
        if any(values):
            yield f"  {part:<20}{_gibibytes(values[0]):>16}{_gibibytes(values[1]):>17}"
    sums = (sum(memory.forward.values()), sum(memory.backward.values()))
    yield f"  {'together':<20}{_gibibytes(sums[0]):>16}{_gibibytes(sums[1]):>17}"
    yield (
        f"  for a micro-batch of {largest.rows} x {largest.length:,} tokens, {largest.labels:,} of them learned; "
        "the most of all steps"
    )
    if len(plan.stages) > 1:
        peaks = [_gibibytes(each.memory.peak) for each in plan.stages]
        shown = [*peaks[: _MOST_STAGES - 1], "...", peaks[-1]] if len(peaks) > _MOST_STAGES else peaks
        yield f"  by pipeline stage: {', '.join(shown)}"
    if plan.facts.device == "cpu":
        yield "  beside what Python, Paddle and PaddleNLP take by themselves, about 1 GiB"


def _name_stage(plan: RunPlan) -> str:
    if len(plan.stages) == 1:
        return ""
    return f", of the fullest stage ({plan.fullest.parts.plan.rank})"


def _describe_disk(plan: RunPlan, free_bytes: int | None) -> Iterator[str]:
    disk = plan.disk
    yield ""
    free = "" if free_bytes is None else f"; {_gibibytes(free_bytes)} GiB are free"
    checkpoints = f"{disk.num_checkpoints} checkpoint{'' if disk.num_checkpoints == 1 else 's'}"
    yield (
        f"Disk: {_gibibytes(disk.total_bytes)} GiB at most, for the result ({_gibibytes(disk.result_bytes)}) "
        f"and {checkpoints} ({_gibibytes(disk.checkpoint_bytes)} each){free}"
    )


def describe_fit(plan: RunPlan, card: float, limit: float, changes: Sequence[Change] | None) -> Iterator[str]:
    """Whether the run fits, and by which changes it would.

    Args:
        plan: The plan.
        card: Bytes of a card.
        limit: Those of them that a run may use.
        changes: Found for one that does not fit.
    """
    yield ""
    needed, size = _gibibytes(plan.peak), f"{card / _GIBIBYTE:g} GiB"
    left = "" if limit == card else f" ({_gibibytes(limit)} of them to be used)"
    if changes is None:
        yield f"It fits: {needed} GiB of {size}{left}."
        return
    yield f"It does not fit: {needed} GiB are needed, a card has {size}{left}."
    if not changes:
        yield "No change that is tried here makes it fit: shorter rows (max_length), or a smaller model."
        return
    yield "The nearest that fit:"
    for change in changes:
        cards = "" if change.num_cards == plan.layout.world else f"{change.num_cards} cards "
        words = " ".join(f"--{name} {_show(value)}" for name, value in change.settings.items())
        yield f"  {_gibibytes(change.peak):>8} GiB  {cards}{words}"


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else shlex.quote(str(value))


def plan_to_json(
    plan: RunPlan, *, card: float | None, fits: bool | None, changes: Sequence[Change] | None
) -> dict[str, Any]:
    """Everything that the screen tells, in bytes, seconds and counts."""
    batches, layout = plan.batches, plan.layout
    return {
        "parameters": plan.model.num_parameters,
        "trained_parameters": plan.model.num_trained,
        "layout": {axis: getattr(layout, axis) for axis in ("data", "pipeline", "sharding", "tensor")},
        "parameters_per_rank": plan.held_per_rank(),
        "updated_per_rank": plan.updated_per_rank(),
        "steps": batches.num_steps,
        "epochs": batches.num_epochs,
        "samples": batches.num_samples,
        "rows": batches.num_rows,
        "tokens": batches.num_tokens,
        "padding_share": batches.padding_share,
        "is_estimate": batches.is_estimate,
        "tokens_per_second": plan.tokens_per_second,
        "seconds": plan.seconds,
        "micro_batch": vars(plan.largest),
        "device": plan.facts.device,
        "memory_per_stage": [_memory_to_json(each.memory) for each in plan.stages],
        "peak_bytes": round(plan.peak),
        "disk": vars(plan.disk) | {"total_bytes": plan.disk.total_bytes},
        "card_bytes": None if card is None else round(card),
        "fits": fits,
        "changes": None if changes is None else [_change_to_json(each) for each in changes],
    }


def _memory_to_json(memory: Any) -> dict[str, Mapping[str, int] | int]:
    moments = {"end_of_forward": memory.forward, "end_of_backward": memory.backward}
    found: dict[str, Mapping[str, int] | int] = {
        name: {part: round(size) for part, size in parts.items()} for name, parts in moments.items()
    }
    return found | {"peak_bytes": round(memory.peak)}


def _change_to_json(change: Change) -> dict[str, Any]:
    return {"settings": dict(change.settings), "cards": change.num_cards, "peak_bytes": round(change.peak)}


def fold(lines: Iterable[str]) -> Iterator[str]:
    """Lines of at most 80 columns; what is longer goes on below, indented, and no word is broken."""
    for line in lines:
        if count_columns(line) <= _WIDTH:
            yield line
            continue
        indent = " " * (len(line) - len(line.lstrip()))
        first, *rest = wrap(line.lstrip(), _WIDTH - len(indent) - 2).split("\n")
        yield indent + first
        yield from (f"{indent}  {each}" for each in rest)


def existing_folder(path: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    path = path.expanduser().absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def _gibibytes(num_bytes: float) -> str:
    return (
        f"{num_bytes / _GIBIBYTE:,.2f}" if num_bytes >= 0.1 * _GIBIBYTE else f"{num_bytes / _GIBIBYTE:,.3f}"
    )
