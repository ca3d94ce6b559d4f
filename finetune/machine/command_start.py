"""The first moments of a command, before its other imports."""

from __future__ import annotations

from finetune.machine.memory_limit import require_address_space
from finetune.machine.stop_signals import end_at_once, kept_from_threads, set_handlers


def hear_signals() -> None:
    """Ends in a line at a signal from here on; all that a command needs which only answers."""
    set_handlers(end_at_once)


def start_command() -> None:
    """Ends in a line at a signal from here on, until `run_command` says what else one does."""
    hear_signals()
    prepare_process()


def prepare_process() -> None:
    """What a command that computes needs before its other imports; what signals do stays as it is.

    NumPy is imported here because OpenBLAS starts threads at its import. The system would hand them the signals that the
    main thread holds back while Paddle is imported.

    Raises:
        UserError: Too little address space is allowed.
    """
    require_address_space()
    with kept_from_threads():
        import numpy  # noqa: F401
