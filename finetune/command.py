"""What every entry script shares: exit codes, messages for users, quiet libraries."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from finetune.errors import EXIT_USER_ERROR, RunError, UserError
from finetune.interruption import Interrupted
from finetune.parallel.watch import close_watch, report_failure

EXIT_FAILED = 1
# A launcher ends everybody at the first failure it sees and takes rank 0's exit code for its own.
_FIRST_SPEAKS_SECONDS = 3


def run_command(main: Callable[[], None]) -> int:
    """Runs a command and turns how it ended into an exit code.

    Returns:
        0 done; 2 the arguments or the data are wrong, one line per fault on stderr, said by the
        first process of each machine; 1 the run failed.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
    except UserError as error:
        if is_first_process() or is_first_of_machine():
            for fault in error.faults:
                print(f"error: {fault}", file=sys.stderr)
        if not is_first_process():
            time.sleep(_FIRST_SPEAKS_SECONDS)
        return _fail(str(error), EXIT_USER_ERROR)
    except Interrupted as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return _fail(f"interrupted: {error}")
    except KeyboardInterrupt:
        print("interrupted by the keyboard: start the same command again to continue", file=sys.stderr)
        return _fail("interrupted by the keyboard")
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return _fail(f"error: {error}")
    except Exception as error:
        traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error}")
    close_watch()
    return 0


def _fail(text: str, code: int = EXIT_FAILED) -> int:
    """Tells the other processes of the run why this one ends."""
    report_failure(text, code)
    return code


def _interrupt(number: int, _frame: object) -> None:
    """Outside the training loop, which saves first, there is nothing that a stop could lose."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers repeat themselves; once is enough
    raise Interrupted(f"stopped by signal {signal.Signals(number).name}; nothing new was to be saved")


def is_first_process() -> bool:
    """Whether this process speaks for the run: the only one, or rank 0 of a launch."""
    return os.environ.get("PADDLE_TRAINER_ID", "0") == "0"


def is_first_of_machine() -> bool:
    """Whether this process is the first on its machine, whose log the launcher there shows."""
    return os.environ.get("PADDLE_LOCAL_RANK", os.environ.get("PADDLE_RANK_IN_NODE", "0")) == "0"


def python_name() -> str:
    """How to call this Python again from the current folder: `.venv/bin/python`, or just `python`."""
    executable = Path(sys.executable)
    try:
        return str(executable.relative_to(Path.cwd()))
    except ValueError:
        return "python"


def silence_libraries() -> None:
    """Keeps PaddleNLP's debug lines and its dependencies' start-up warnings off the screen.

    Errors still show. FINETUNE_VERBOSE=1 in the environment shows everything.
    """
    if os.environ.get("FINETUNE_VERBOSE") == "1":
        return
    os.environ.setdefault("GLOG_minloglevel", "2")
    warnings.filterwarnings("ignore")
    logging.getLogger("jieba").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import paddle
        from paddle.distributed.fleet.utils import log_util as fleet_log
        from paddlenlp.utils.log import logger

    # Paddle's own handlers would print a C++ stack on SIGTERM instead of letting ours act.
    paddle.disable_signal_handler()
    signal.signal(signal.SIGTERM, _interrupt)

    logger.set_level("ERROR")
    fleet_log.set_log_level("ERROR")
    # Paddle's deprecation decorator re-enables its warnings; the filter must come after the import.
    warnings.filterwarnings("ignore")
