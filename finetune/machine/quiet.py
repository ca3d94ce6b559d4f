"""Keeps libraries quiet, and signals with their handlers."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from finetune.machine.screen import show_line
from finetune.machine.stop_signals import delayed, renew_handlers


def announce_import() -> None:
    """Says that Paddle is going to be imported, which takes up to 20 seconds; once, by the first process."""
    if "paddle" not in sys.modules and os.environ.get("PADDLE_TRAINER_ID", "0") == "0":
        show_line("Loading PaddlePaddle ...")


def silence_libraries(*, announces: bool = True) -> None:
    """Keeps PaddleNLP's debug lines and its dependencies' start-up warnings off the screen.

    Errors still show. FINETUNE_VERBOSE=1 in the environment shows everything.

    Args:
        announces: Whether the wait for the import is told; False in processes that the user did not start.
    """
    is_verbose = os.environ.get("FINETUNE_VERBOSE") == "1"
    if not is_verbose:
        os.environ.setdefault("GLOG_minloglevel", "2")
        warnings.filterwarnings("ignore")
        logging.getLogger("jieba").setLevel(logging.WARNING)
    if announces:
        announce_import()
    # Paddle's own handlers would print a C++ stack on SIGTERM instead of letting ours act.
    with delayed():
        import paddle

        paddle.disable_signal_handler()
    with warnings.catch_warnings():
        if not is_verbose:
            warnings.simplefilter("ignore")
        from paddle.distributed.fleet.utils import log_util as fleet_log
        from paddlenlp.utils.log import logger

    renew_handlers()  # PaddleNLP, too, has Paddle give up its handlers, and takes ours away with them
    if is_verbose:
        return
    logger.set_level("ERROR")
    fleet_log.set_log_level("ERROR")
    # Paddle's deprecation decorator re-enables its warnings; the filter must come after the import.
    warnings.filterwarnings("ignore")
