"""The position of the learning-rate schedule, and the loss scale of float16 runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError
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
    path = folder / SCHEDULER_FILE
    state = read_json_object(path, keys=("scheduler",))
    if fault := _find_wrong_value(state["scheduler"]):
        raise UserError(f"{path} cannot be used ({fault}): copy it again")
    scheduler.set_state_dict(state["scheduler"])
    # The next update takes the rate that was worked out before the save, of a schedule that may have been shorter.
    scheduler.last_lr = scheduler.get_lr()
    if scaler is not None and "scaler" in state:
        saved = dict(state["scaler"])
        if isinstance(saved.get("scale"), list):
            saved["scale"] = np.asarray(saved["scale"], dtype="float32")
        scaler.load_state_dict(saved)


def _find_wrong_value(fields: Any) -> str | None:
    """What of a schedule's state is missing or no number; None when all is right."""
    if not isinstance(fields, dict):
        return "scheduler is no object"
    for name, kind in (("last_epoch", int), ("last_lr", int | float)):
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            return f"{name} of the scheduler is missing or no number"
    return None


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
