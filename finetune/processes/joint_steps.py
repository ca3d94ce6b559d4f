"""Steps that all ranks take or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from finetune.errors import RunError, UserError
from finetune.processes.groups import ProcessGroups

Value = TypeVar("Value")


class RankFailed(RunError, RuntimeError):
    """Another rank failed in a step that all take together; that one says more."""


@contextmanager
def fail_on_all_ranks(groups: ProcessGroups, clean_up: Callable[[], None] | None = None) -> Iterator[None]:
    """A block that fails on all ranks when it fails on one; it ends when all have come to its end.

    For work that each rank does for itself, such as writing a file: a rank that failed would otherwise leave the
    others waiting in their next collective call. The block itself must not communicate, or only so that a rank that
    fails has made the same calls as the others.

    Args:
        groups: All ranks enter the block.
        clean_up: What rank 0 does when a rank has failed.

    Raises:
        Exception: What the block raised on this rank; RankFailed, with its number, on the others.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if groups.world.size == 1:
            if clean_up is not None:
                clean_up()
            raise
        failure = error
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    answers = groups.world.gather_objects(text)
    failed = next((rank for rank, answer in enumerate(answers) if answer is not None), None)
    if failed is None:
        return
    if groups.is_first and clean_up is not None:
        clean_up()
    if failure is not None:
        raise failure
    raise RankFailed(f"rank {failed} failed: {answers[failed]}")


def on_first(groups: ProcessGroups, function: Callable[[], Value]) -> Value:
    """What a function returns on the first process, on all processes.

    Args:
        groups: The run's processes; every one must call this.
        function: Called on the first one only; its result, a plain value, is handed on.

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
    kind, content = groups.world.gather_objects(answer)[0]
    if kind == "faults":
        raise UserError(content)
    value: Value = content
    return value
