"""PaddleNLP's built-in datasets, by name, as conversations."""

from __future__ import annotations

from pathlib import Path

from finetune.data.reading.conversation import Conversation
from finetune.data.reading.formats import convert
from finetune.data.reading.records import FaultCollector, Record
from finetune.errors import Interrupted, UserError


def load_builtin(name: str, task_name: str | None, split: str) -> list[Conversation]:
    """Reads one split of a dataset that PaddleNLP knows by name, downloading it when needed.

    Args:
        name: The dataset's name for PaddleNLP's `load_dataset`.
        task_name: A part of it, or None.
        split: "train" or "dev".

    Raises:
        UserError: There is no such dataset, it cannot be fetched, or its rows have no known format.
    """
    from finetune.models import hub

    # Without the network PaddleNLP would retry for most of a minute before it gives up.
    if not (Path.home() / ".paddlenlp" / "datasets" / name).exists() and not hub.is_reachable():
        raise UserError(
            f"dataset_name_or_path {name!r} is no folder, and datasets by name come from the network, which cannot be "
            "reached. Give a folder that holds train.json and dev.json."
        )
    from paddlenlp.datasets import load_dataset

    try:
        rows = (
            load_dataset(name, task_name, splits=[split]) if task_name else load_dataset(name, splits=[split])
        )
    except BaseException as error:  # PaddleNLP raises anything here, SystemExit among it
        if isinstance(error, (KeyboardInterrupt, Interrupted)):
            raise
        raise UserError(
            f"dataset_name_or_path {name!r} is no folder, and PaddleNLP has no dataset of that name that can be "
            f"loaded here ({type(error).__name__}: {error}). Give a folder that holds train.json and dev.json."
        ) from None
    faults = FaultCollector()
    records = (
        Record(file=Path(f"{name}/{split}"), line_number=number, fields=row)
        for number, row in enumerate(rows, start=1)
    )
    conversations = list(convert(records, faults))
    faults.raise_if_any()
    return conversations
