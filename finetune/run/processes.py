"""Brings the processes of a run together, and takes them apart at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.machine.determinism import make_deterministic
from finetune.machine.device import use_device
from finetune.machine.quiet import silence_libraries
from finetune.processes.groups import ProcessGroups, start_groups
from finetune.processes.layout import Layout, count_processes
from finetune.processes.phases import PhaseRecord
from finetune.processes.watch.watch import start_watch
from finetune.run.experts import check_balance
from finetune.run.layout import check_topology, layout_of
from finetune.settings.engine_words import split_words

if TYPE_CHECKING:
    from finetune.models.resolve import ResolvedModel
    from finetune.settings.arguments import Arguments


def plan_layout(args: Arguments, resolved: ResolvedModel) -> Layout:
    """The layout of a run, compared with the model and the method before processes meet.

    Raises:
        UserError: The degrees do not fit the number of processes, the model or the method.
    """
    layout = layout_of(args, count_processes())
    check_topology(layout, resolved, args)
    check_balance(args, resolved)
    return layout


@contextmanager
def start_processes(args: Arguments, layout: Layout, phases: PhaseRecord) -> Iterator[ProcessGroups]:
    """Connects the processes for the time of the block; `run_command` ends the watch over them.

    Args:
        args: The arguments of the run.
        layout: How many processes there are, and what each does.
        phases: What this process does, for the watch.
    """
    if layout.world == 1:
        yield ProcessGroups()
        return
    phases.enter("connecting")
    shared_folder = Path(args.training.output_dir).expanduser()
    # Before Paddle is imported: a rank that dies in that import, or waits for it, is noticed by the others.
    start_watch(phases, hang_seconds=args.model.hang_timeout, shared_folder=shared_folder)
    phases.enter("importing libraries")
    silence_libraries()
    prepare_device(args, layout.world)  # before groups are made, which belong to a card
    words = split_words(args.training.tensor_parallel_config)
    yield start_groups(layout, device=args.training.device, tensor_words=words)


def prepare_device(args: Arguments, num_processes: int) -> None:
    """Has Paddle work on the run's device, by kernels that add in one order where that is asked for."""
    if args.model.deterministic:
        make_deterministic(args.training.device)
    use_device(args.training.device, num_processes)
