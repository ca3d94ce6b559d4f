"""The names that the setting `columns` may map, and those that every example needs where they are mapped."""

from collections.abc import Iterator
from typing import Any

COLUMN_NAMES = (
    *("prompt", "query", "response", "history", "system", "tools", "messages", "conversations", "text"),
    *("instruction", "input", "output", "src", "tgt", "chosen", "rejected", "kto_tag", "label"),
    *("rejected_response", "rejected_messages", "sort", "margin"),
)
REQUIRED_COLUMNS = frozenset(
    {
        "prompt",
        "response",
        "messages",
        "conversations",
        "text",
        "instruction",
        "output",
        "src",
        "tgt",
        "chosen",
    }
)


def find_column_faults(columns: dict[str, Any] | None) -> Iterator[str]:
    """Why a map of columns cannot be used, one line each."""
    for name, column in (columns or {}).items():
        if not isinstance(column, str) or not column:
            yield f"columns: {name} must be the name of a field of the files, as text"
        elif name not in COLUMN_NAMES:
            swapped = f' (write {{"{column}": "{name}"}})' if column in COLUMN_NAMES else ""
            yield f'columns: "{name}" is no name that can be mapped{swapped}: choose from {", ".join(COLUMN_NAMES)}'
    used = [column for column in (columns or {}).values() if isinstance(column, str)]
    for column in sorted({column for column in used if used.count(column) > 1}):
        yield f'columns: "{column}" is given for several names'
