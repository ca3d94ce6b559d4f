"""What every entry script shares: exit codes and messages for users."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from finetune.errors import (
    EXIT_FAILED,
    EXIT_USER_ERROR,
    Interrupted,
    RunError,
    UserError,
    describe_outside_error,
)
from finetune.machine.language.translation import keep_values
from finetune.machine.memory_limit import describe_memory_failure
from finetune.machine.screen import print_text, show_line
from finetune.machine.stop_signals import end_command, ignore_repeats, set_handlers
from finetune.processes.launch import is_first_of_machine, is_first_process, is_only_process
from finetune.processes.watch.watch import close_watch, report_failure
from finetune.storage.disk_failures import describe_disk_failure

# A launcher ends everybody at the first failure it sees and takes rank 0's exit code for its own.
_FIRST_SPEAKS_SECONDS = 3


_OUTPUT = "the output of this command"
"""Told of a full disk. Whoever closed a pipe, such as `head`, wants to hear nothing."""


def run_command(main: Callable[[], int | None]) -> int:
    """Runs a command and turns how it ended into an exit code.

    Args:
        main: The command; a number that it returns is the exit code.

    Returns:
        0 done; 2 the arguments or the data are wrong, one line per fault on stderr, said by the
        first process of each machine; 1 the run failed.
    """
    keep_values(*(part for word in sys.argv[1:] for part in (word, word.partition("=")[2])))
    previous = set_handlers(end_command)
    code = EXIT_FAILED
    try:
        code = _run(main)
        return code
    except Interrupted as error:  # while a failure was being told
        print_text(f"interrupted: {error}", stream=sys.stderr)
        return code
    finally:
        was_stopped = any(signal.getsignal(number) is not end_command for number in previous)
        # A launcher that sees another rank fail first sends SIGTERM, which would replace this one's exit code.
        if was_stopped or (code and not is_only_process()):
            ignore_repeats()
        else:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _run(main: Callable[[], int | None]) -> int:
    try:
        code = main()
    except UserError as error:
        if is_first_process() or is_first_of_machine():
            for fault in error.faults:
                show_line(f"error: {fault}")
        if not is_first_process():
            time.sleep(_FIRST_SPEAKS_SECONDS)
        return _fail(str(error), EXIT_USER_ERROR)
    except Interrupted as error:
        print_text(f"interrupted: {error}", stream=sys.stderr)
        return _fail(f"interrupted: {error}")
    except KeyboardInterrupt:
        print_text("interrupted by the keyboard: start the same command again to continue", stream=sys.stderr)
        return _fail("interrupted by the keyboard")
    except RunError as error:
        show_line(f"error: {error}")
        return _fail(f"error: {error}")
    except Exception as error:
        return _fail_outside(error)
    close_watch()
    return code or 0


def _fail_outside(error: Exception) -> int:
    """Says what the operating system, the memory or a parser said; all else is a fault of the program."""
    if isinstance(error, OSError) and error.filename is None and not _takes_output():
        error.filename = _OUTPUT
    described = describe_outside_error(error)
    if of_memory := describe_memory_failure(error):
        described = of_memory, EXIT_FAILED
    elif described is None and (of_library := describe_disk_failure(error)):
        described = of_library, EXIT_FAILED
    if described is None or os.environ.get("FINETUNE_VERBOSE") == "1":
        traceback.print_exc()
    if described is None:
        return _fail(f"{type(error).__name__}: {error}")
    text, code = described
    if not isinstance(error, BrokenPipeError) or error.filename != _OUTPUT:
        show_line(f"error: {text}")
    return _fail(text, code)


def _takes_output() -> bool:
    """Whether what is printed still finds a place; what does not is given up, so that the end is not disturbed.

    A line end shows it: what could not be written may have left Python's buffer all the same.
    """
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"\n")
    except ValueError:  # it is closed, or no file of the system's
        return True
    except OSError:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        return False
    return True


def _fail(text: str, code: int = EXIT_FAILED) -> int:
    """Tells the other processes of the run why this one ends."""
    report_failure(text, code)
    return code
