"""How often each address did something in the last minute."""

from __future__ import annotations

import time
from collections import OrderedDict, deque

_MINUTE = 60.0
_MAX_ADDRESSES = 4096


class AddressCounts:
    """Counts by address; of many addresses the oldest is forgotten.

    Args:
        limit: So many a minute are allowed.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def add(self, address: str) -> None:
        """Counts one more."""
        self._times.setdefault(address, deque(maxlen=self._limit)).append(time.monotonic())
        self._times.move_to_end(address)
        while len(self._times) > _MAX_ADDRESSES:
            self._times.popitem(last=False)

    def are_used_up(self, address: str) -> bool:
        """Whether there were as many as are allowed."""
        times = self._times.get(address)
        return times is not None and len(times) == self._limit and time.monotonic() - times[0] < _MINUTE
