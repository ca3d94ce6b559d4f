"""The layout that a run's settings ask for, compared with its model and method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.processes.layout import SHARDING_STAGES, Layout, split_processes
from finetune.processes.topology import _layer_faults, nearest_layouts, nearest_line

if TYPE_CHECKING:
    from finetune.models.resolve import ResolvedModel
    from finetune.settings.arguments import Arguments


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
        faults.append(nearest_line(layout.world, nearest) + note)
    faults += _layer_faults(family, args)
    if faults:
        raise UserError(faults)


def _method_faults(layout: Layout, args: Arguments, virtual_degree: int) -> list[str]:
    faults = []
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
