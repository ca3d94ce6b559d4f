"""The position of the learning-rate schedule, and the loss scale of float16 runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from finetune.storage.files import read_json_object, write_json

SCHEDULER_FILE = "scheduler.json"


def save_scheduler(folder: Path, scheduler: Any, scaler: Any = None) -> None:
    """Writes the learning-rate scheduler's position and, in float16 runs, the loss scale."""
    state = {"scheduler": scheduler.state_dict()}
    if scaler is not None:
        state["scaler"] = {key: _plain(value) for key, value in scaler.state_dict().items()}
    write_json(folder / SCHEDULER_FILE, state)


def load_scheduler(folder: Path, scheduler: Any, scaler: Any = None) -> None:
    """Restores what `save_scheduler` wrote.

    Raises:
        UserError: The file cannot be read or is another one.
    """
    state = read_json_object(folder / SCHEDULER_FILE, keys=("scheduler",))
    scheduler.set_state_dict(state["scheduler"])
    # The next update takes the rate that was worked out before the save, of a schedule that may have been shorter.
    scheduler.last_lr = scheduler.get_lr()
    if scaler is not None and "scaler" in state:
        saved = dict(state["scaler"])
        if isinstance(saved.get("scale"), list):
            saved["scale"] = np.asarray(saved["scale"], dtype="float32")
        scaler.load_state_dict(saved)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
