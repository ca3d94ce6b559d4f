"""The layout that a run asks for, compared with its model and method before any process meets another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.parallel.layout import SHARDING_STAGES, Layout, split_processes

if TYPE_CHECKING:
    from finetune.models.family import Family
    from finetune.models.loading import ResolvedModel
    from finetune.settings.arguments import Arguments

_MOST_ROWS = 16


def layout_of(args: Arguments, num_processes: int) -> Layout:
    """The layout that a run's degrees ask for; processes that no degree claims become replicas.

    Raises:
        UserError: The degrees do not divide the number of processes.
    """
    training = args.training
    layout = split_processes(
        num_processes,
        tensor=training.tensor_parallel_degree,
        pipeline=training.pipeline_parallel_degree,
        sharding=training.sharding_parallel_degree,
        sharded=sharding_stage(args) > 0,
    )
    if layout is None:
        raise UserError(
            f"tensor_parallel_degree {training.tensor_parallel_degree} x pipeline_parallel_degree "
            f"{training.pipeline_parallel_degree} x sharding_parallel_degree {training.sharding_parallel_degree} "
            f"does not divide the {num_processes} processes of this run: change a degree or start another number"
        )
    return layout


def sharding_stage(args: Arguments) -> int:
    """What replicas share out: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too."""
    words = (args.training.sharding or "").split()
    return max((SHARDING_STAGES.get(word, 0) for word in words), default=0)


def check_topology(
    layout: Layout, resolved: ResolvedModel, args: Arguments, *, vocab_size: int | None = None
) -> None:
    """Compares a layout with the model and the method, before processes meet or weights are read.

    Args:
        layout: From `layout_of`.
        resolved: The model's config.json and family.
        args: The run's settings.
        vocab_size: Rows of the embeddings where they are not those of the config, because the tokenizer
            has more tokens.

    Raises:
        UserError: With every fault, and at its end the nearest layouts that fit.
    """
    family = resolved.family
    config = family.adapt_config(resolved.config)

    def faults_of(candidate: Layout, virtual_degree: int) -> list[str]:
        sizes = family.parallel_faults(
            config,
            tensor_degree=candidate.tensor,
            pipeline_degree=candidate.pipeline,
            virtual_degree=virtual_degree,
            vocab_size=vocab_size,
        )
        return sizes + _method_faults(candidate, args, virtual_degree)

    virtual_degree = args.model.virtual_pp_degree
    faults = faults_of(layout, virtual_degree)
    if faults:
        sharded, note = sharding_stage(args) > 0, ""
        nearest = nearest_layouts(layout, lambda each: not faults_of(each, virtual_degree), sharded=sharded)
        if not nearest and virtual_degree > 1:
            nearest = nearest_layouts(layout, lambda each: not faults_of(each, 1), sharded=sharded)
            note = " (with virtual_pp_degree 1)" if nearest else ""
        faults.append(_nearest_line(layout.world, nearest) + note)
    faults += _layer_faults(family, args)
    if faults:
        raise UserError(faults)


def _method_faults(layout: Layout, args: Arguments, virtual_degree: int) -> list[str]:
    faults, model = [], args.model
    if model.lora and model.pissa and layout.tensor > 1:
        faults.append(
            f"pissa starts from the singular vectors of whole weights, but tensor_parallel_degree {layout.tensor} "
            "cuts them into slices, which have other ones: set pissa false, or tensor_parallel_degree 1"
        )
    if args.data.eval_with_do_generation and args.training.do_eval and layout.pipeline > 1:
        faults.append(
            f"eval_with_do_generation is true, but text is not generated over {layout.pipeline} pipeline stages: "
            "train with eval_with_do_generation false, then evaluate the result with do_train false and "
            "pipeline_parallel_degree 1"
        )
    if virtual_degree > 1 and layout.pipeline == 1:
        faults.append(
            f"virtual_pp_degree is {virtual_degree}, but pipeline_parallel_degree is 1: it divides the "
            "stages of a pipeline, so set it to 1 or use 2 stages or more"
        )
    if args.training.sequence_parallel and layout.tensor == 1:
        faults.append(
            "sequence_parallel is true, but tensor_parallel_degree is 1: it splits rows over tensor-parallel "
            "ranks, so set it to false or use a tensor_parallel_degree of 2 or more"
        )
    return faults


def _layer_faults(family: Family, args: Arguments) -> list[str]:
    """What no other layout would mend."""
    faults = []
    if args.training.sequence_parallel and not family.sequence_parallel:
        faults.append(
            f"sequence_parallel is true, but PaddleNLP's layers of family {family.name} cannot split rows: "
            "set it to false; recompute saves memory, too"
        )
    if args.training.sequence_parallel and args.model.prefix_tuning:
        faults.append(
            "sequence_parallel and prefix_tuning are both true, but a prefix stands before whole rows: "
            "set sequence_parallel to false"
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


def _nearest_line(num_processes: int, nearest: Sequence[Layout]) -> str:
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    if not nearest:
        return f"no layout of {processes} fits this model and method: start another number of processes"
    return f"layouts of {processes} that fit, the nearest first: {'; '.join(map(str, nearest))}"


def describe_layout(layout: Layout, parameters_per_rank: Sequence[int] | None = None) -> str:
    """A table of where every rank stands; long ones are shortened in the middle.

    Args:
        layout: The degrees.
        parameters_per_rank: Number of parameters that each rank holds, by rank.
    """
    header = ["rank", "data", "pipeline", "sharding", "tensor"]
    header += ["parameters"] if parameters_per_rank else []
    rows = [header]
    ranks = range(layout.world)
    shown = list(ranks) if layout.world <= _MOST_ROWS else [*ranks[: _MOST_ROWS - 1], ranks[-1]]
    for rank in shown:
        place = layout.coordinates(rank)
        row = [str(number) for number in (rank, place.data, place.pipeline, place.sharding, place.tensor)]
        if parameters_per_rank:
            row.append(_format_count(parameters_per_rank[rank]))
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
