"""Brings the processes of a run together, and takes them apart at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.command import silence_libraries
from finetune.determinism import make_deterministic
from finetune.device import use_device
from finetune.errors import UserError
from finetune.parallel.groups import ProcessGroups, start_groups
from finetune.parallel.layout import Layout, count_processes
from finetune.parallel.phases import phase
from finetune.parallel.topology import check_topology, layout_of
from finetune.parallel.watch import start_watch

if TYPE_CHECKING:
    from finetune.models.loading import ResolvedModel
    from finetune.settings.arguments import Arguments

Value = TypeVar("Value")


def plan_layout(args: Arguments, resolved: ResolvedModel) -> Layout:
    """The layout of a run, compared with the model and the method before processes meet.

    Raises:
        UserError: The degrees do not fit the number of processes, the model or the method.
    """
    layout = layout_of(args, count_processes())
    check_topology(layout, resolved, args)
    return layout


@contextmanager
def start_processes(args: Arguments, layout: Layout) -> Iterator[ProcessGroups]:
    """Connects the processes for the time of the block; `run_command` ends the watch over them."""
    if layout.world == 1:
        yield ProcessGroups()
        return
    phase("connecting")
    silence_libraries()
    start_watch(hang_seconds=args.model.hang_timeout)
    prepare_device(args, layout.world)  # before groups are made, which belong to a card
    yield start_groups(layout, device=args.training.device)


def prepare_device(args: Arguments, num_processes: int) -> None:
    """Has Paddle work on the run's device, by kernels that add in one order where that is asked for."""
    if args.model.deterministic:
        make_deterministic(args.training.device)
    use_device(args.training.device, num_processes)


def on_first(groups: ProcessGroups, function: Callable[[], Value]) -> Value:
    """What a function returns on the first process, on all processes.

    Args:
        groups: The run's processes; every one must call this.
        function: Called on the first one only; its result is handed on as a pickled object.

    Raises:
        UserError: Raised by the function, on every process.
    """
    if groups.world.size == 1:
        return function()
    answer: Any = None
    if groups.is_first:
        try:
            answer = ("value", function())
        except UserError as error:
            answer = ("faults", list(error.faults))
    kind, value = groups.world.gather_objects(answer)[0]
    if kind == "faults":
        raise UserError(value)
    return value
