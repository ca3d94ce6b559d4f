"""The time that templates are told: now, or the day on which a run began, so that its data do not change over night."""

from __future__ import annotations

from datetime import datetime

_DAY: list[str] = []


def set_day(day: str | None) -> None:
    """Fixes the time for this process to the beginning of a day.

    Args:
        day: Such as "2026-11-26"; None: templates are told what time it is.
    """
    _DAY[:] = [] if day is None else [day]


def fixed_day() -> str | None:
    """The day that was fixed."""
    return _DAY[0] if _DAY else None


def template_time() -> datetime:
    """What templates are told."""
    return datetime.fromisoformat(_DAY[0]) if _DAY else datetime.now()
