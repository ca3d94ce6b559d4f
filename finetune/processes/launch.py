"""What a launcher says of this process in the environment."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this process speaks for the run: the only one, or rank 0 of a launch."""
    return os.environ.get("PADDLE_TRAINER_ID", "0") == "0"


def is_first_of_machine() -> bool:
    """Whether this process is the first on its machine, whose log the launcher there shows."""
    return os.environ.get("PADDLE_LOCAL_RANK", os.environ.get("PADDLE_RANK_IN_NODE", "0")) == "0"


def is_only_process() -> bool:
    """Whether the run has no other process."""
    return os.environ.get("PADDLE_TRAINERS_NUM", "1") == "1"
