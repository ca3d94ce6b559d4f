"""A map of columns and of tags: files that have other names for the fields and for the parts of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.data.reading.marks import REJECTED_FIELDS
from finetune.data.reading.records import Record, RecordError
from finetune.settings.column_names import REQUIRED_COLUMNS

# LLaMA-Factory's names of roles, and ours.
_ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "tool_call",
    "system_tag": "system",
}

_HOLDERS = frozenset({"messages", "conversations", "conversation", "chosen"}) | REJECTED_FIELDS


def rename_fields(record: Record, columns: Mapping[str, str]) -> Record:
    """The record with the fields that a map names under our names.

    A field of the file that has one of our names, but is not the one that the map gives for it, is left out.

    Raises:
        RecordError: A field that is needed is not there.
    """
    fields = dict(record.fields)
    taken = {name: fields[column] for name, column in columns.items() if column in fields}
    missing = [name for name in columns if name not in taken and name in REQUIRED_COLUMNS]
    if missing:
        present = ", ".join(map(repr, record.fields)) or "none"
        raise RecordError(
            record,
            f"columns names {columns[missing[0]]!r} for {missing[0]}, which is missing (fields present: {present})",
        )
    for column in columns.values():
        fields.pop(column, None)
    return record.with_fields({**fields, **taken})


def rename_messages(record: Record, tags: Mapping[str, str]) -> Record:
    """The record with the usual names in all that holds messages."""
    renamed: dict[str, Any] = {}
    for name in _HOLDERS & record.fields.keys():
        value = record.fields[name]
        if isinstance(value, list):
            renamed[name] = _rename_parts(value, tags)
        elif isinstance(value, dict):
            renamed[name] = _rename_parts([value], tags)[0]
    return record.with_fields({**record.fields, **renamed})


def _rename_parts(items: list[Any], tags: Mapping[str, str]) -> list[Any]:
    """The messages with role and content under these names; what is no object stays."""
    role_key, content_key = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    roles = {tags[tag]: role for tag, role in _ROLE_TAGS.items() if tag in tags}
    renamed = []
    for item in items:
        if isinstance(item, dict) and role_key in item:
            rest = {key: value for key, value in item.items() if key not in (role_key, content_key)}
            role = item[role_key]
            content = {"content": item[content_key]} if content_key in item else {}
            item = {"role": roles.get(role, role) if isinstance(role, str) else role, **content, **rest}
        renamed.append(item)
    return renamed
