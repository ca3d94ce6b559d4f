"""The entries of the setting `dataset_mix`, judged before any file is read."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.settings.dataset_registry import find_entry
from finetune.settings.paths import describe_missing, shorten


def find_mix_faults(entries: list[dict[str, Any]] | None, dataset_dir: str | None = None) -> Iterator[str]:
    """Why these entries cannot be used, one line each.

    Args:
        entries: Objects with path, ratio and max_samples, where null means that nothing is mixed.
        dataset_dir: The folder of a registry, whose names are paths too.
    """
    if entries == []:
        yield 'dataset_mix is empty: give at least one {"path": ...}, or leave it out'
    for position, entry in enumerate(entries or []):
        yield from (f"dataset_mix[{position}]: {fault}" for fault in _find_entry_faults(entry, dataset_dir))
    weighted = [entry.get("ratio") is not None for entry in entries or []]
    if any(weighted) and not all(weighted):
        position = weighted.index(False)
        yield f"dataset_mix[{position}] has no ratio, but others have: give every data set one, or none"


def _find_entry_faults(entry: Mapping[str, Any], dataset_dir: str | None) -> Iterator[str]:
    if unknown := sorted(set(entry) - {"path", "ratio", "max_samples"}):
        yield f'unknown key "{unknown[0]}", allowed are path, ratio and max_samples'
    path, ratio, limit = (entry.get(key) for key in ("path", "ratio", "max_samples"))
    if not isinstance(path, str) or not path:
        yield "path is missing: give a folder with train.json, or a file"
    elif (
        "://" not in path
        and not os.path.exists(os.path.expanduser(path))
        and find_entry(path, dataset_dir) is None
    ):
        yield f'path is "{shorten(path)}", {describe_missing(path)}'
    if ratio is not None and not (_is_number(ratio) and 0 < ratio < math.inf):
        yield f"ratio is {_to_json(ratio)}: it must be a number above 0"
    if limit is not None and not (isinstance(limit, int) and _is_number(limit) and limit > 0):
        yield f"max_samples is {_to_json(limit)}: it must be a whole number of at least 1"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]
