"""Keeps libraries quiet, and signals ours."""

from __future__ import annotations

import logging
import os
import signal
import warnings

from finetune.errors import Interrupted


def interrupt(number: int, _frame: object) -> None:
    """Outside the training loop, which saves first, there is nothing that a stop could lose."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers repeat themselves; once is enough
    raise Interrupted(f"stopped by signal {signal.Signals(number).name}; nothing new was to be saved")


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
    signal.signal(signal.SIGTERM, interrupt)

    logger.set_level("ERROR")
    fleet_log.set_log_level("ERROR")
    # Paddle's deprecation decorator re-enables its warnings; the filter must come after the import.
    warnings.filterwarnings("ignore")
