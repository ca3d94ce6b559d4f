"""A data set of LLaMA-Factory's ``dataset_info.json`` as a source of this program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from finetune.data.reading.mixing import DataSource
from finetune.data.reading.read_options import ReadOptions
from finetune.data.reading.source import find_split
from finetune.errors import UserError
from finetune.settings.column_names import COLUMN_NAMES
from finetune.settings.dataset_registry import REMOTE_KEYS, RegistryEntry

_FORMATS = {"alpaca": None, "sharegpt": "messages", "openai": "messages"}
# Of several places a file is read; names of fields that have no place in this program: told as not used where the data have them.
_OTHER_COLUMNS = frozenset({"images", "videos", "audios"})
_OTHER_KEYS = frozenset({"subset", "split", "folder", *REMOTE_KEYS})
_KEYS = _OTHER_KEYS | {"file_name", "formatting", "ranking", "num_samples", "columns", "tags"}
_TAGS = frozenset(
    {"role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"}
)


def make_source(entry: RegistryEntry, options: ReadOptions) -> DataSource:
    """The source of an entry.

    Args:
        entry: The entry.
        options: Of the run; the entry's own columns, tags and format come first.

    Raises:
        UserError: What the entry says cannot be used, all faults together.
    """
    content = entry.content
    if faults := [f"{entry.registry}: {entry.name}: {fault}" for fault in _find_faults(content)]:
        raise UserError(faults)
    formatting = content.get("formatting") or "alpaca"
    columns = {
        name: column
        for name, column in (content.get("columns") or {}).items()
        if name not in _OTHER_COLUMNS and column
    }
    tags = dict(content.get("tags") or {})
    if formatting == "openai":
        tags = {"role_tag": "role", "content_tag": "content"} | tags
    if _FORMATS[formatting]:
        columns = {"messages": "messages" if formatting == "openai" else "conversations"} | columns
        tags = {"role_tag": "from", "content_tag": "value"} | tags
    dataset_format = "preference" if content.get("ranking") else _FORMATS[formatting]
    if options.columns:
        columns |= options.columns
    return DataSource(
        name=entry.name,
        files=tuple(find_split(entry.path, "train")),
        max_samples=content.get("num_samples"),
        options=replace(
            options, columns=columns, tags=tags, dataset_format=options.dataset_format or dataset_format
        ),
    )


def _find_faults(content: Mapping[str, Any]) -> Iterator[str]:
    formatting, columns, tags = (content.get(key) for key in ("formatting", "columns", "tags"))
    if formatting is not None and formatting not in _FORMATS:
        yield f"formatting is {formatting!r}, expected one of {', '.join(_FORMATS)}"
    for key, value, known in (
        ("columns", columns, {*COLUMN_NAMES, *_OTHER_COLUMNS}),
        ("tags", tags, _TAGS),
    ):
        if value is not None and not isinstance(value, dict):
            yield f"{key} is no object"
            continue
        for name, text in (value or {}).items():
            if name not in known:
                yield f"{key}: {name!r} is not known, expected one of {', '.join(sorted(known))}"
            elif text is not None and not isinstance(text, str):
                yield f"{key}: {name} must be a text"
    limit = content.get("num_samples")
    if limit is not None and not (isinstance(limit, int) and not isinstance(limit, bool) and limit > 0):
        yield f"num_samples is {limit!r}, expected a whole number of at least 1"
    if unknown := sorted(content.keys() - _KEYS):
        yield f"{', '.join(unknown)} cannot be used here: take it out"
