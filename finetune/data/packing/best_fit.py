"""Best-fit-decreasing on counts: runs of equal samples go into runs of equal bins at once.

Best-fit-decreasing takes the samples from the longest to the shortest and puts each into the bin whose
remaining room is the smallest that still holds it; a new bin opens when there is none. Lengths are bounded
integers, so nearly all of that repeats: samples of one length are alike, and so are bins with the same
contents. When samples of length n come to a run of bins with room r (the tightest that holds one)::

    r = 700, 40 bins;  n = 300, 61 samples left, two fit each
    -> 30 bins take two and keep room 100,  1 bin takes one and keeps room 400,  9 bins keep room 700

which is what placing them one by one does: the bin that has just taken a sample is the tightest again as
long as another one fits. So as many bins open, and as much room is left in them.

The steps number a few for each distinct length (some thousands at 4096), however many samples there are.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

import numpy as np
from numpy.typing import NDArray


class _OpenBins:
    """Runs of consecutive bin numbers, by the room that is left in each of their bins."""

    def __init__(self) -> None:
        self._runs: dict[int, list[tuple[int, int]]] = {}
        self._rooms: list[int] = []  # the keys, ascending

    def add(self, room: int, start: int, stop: int) -> None:
        if room == 0 or start == stop:
            return
        if room not in self._runs:
            self._runs[room] = []
            insort(self._rooms, room)
        self._runs[room].append((start, stop))

    def take_tightest(self, length: int) -> tuple[int, int, int] | None:
        """Room, start and stop of a run of the tightest bins that hold `length` tokens."""
        place = bisect_left(self._rooms, length)
        if place == len(self._rooms):
            return None
        room = self._rooms[place]
        start, stop = self._runs[room].pop()
        if not self._runs[room]:
            del self._runs[room], self._rooms[place]
        return room, start, stop


def assign_bins(counts: NDArray[Any], capacity: int) -> NDArray[Any]:
    """The bin of every sample, samples taken from the longest to the shortest.

    Args:
        counts: Integers [lengths], ``counts[n]`` samples have n tokens; n is 1 to `capacity` where it is not 0.
        capacity: Tokens that fit into a bin.

    Returns:
        int64 [samples]: bin numbers, counted from 0 in the order in which bins open.
    """
    bins = _OpenBins()
    runs: list[tuple[int, int, int]] = []  # first bin, number of bins, samples in each of them
    num_bins = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            found = bins.take_tightest(length)
            if found is None:
                found = capacity, num_bins, num_bins - -left // (capacity // length)
                num_bins = found[2]
            room, start, stop = found
            per_bin = room // length
            middle = start + min(stop - start, left // per_bin)  # bins before it take all that fits
            left -= (middle - start) * per_bin
            runs.append((start, middle - start, per_bin))
            bins.add(room - per_bin * length, start, middle)
            if left and middle < stop:
                runs.append((middle, 1, left))
                bins.add(room - left * length, middle, middle + 1)
                left, middle = 0, middle + 1
            bins.add(room, middle, stop)
    return _expand(np.array(runs, dtype=np.int64).reshape(-1, 3))


def _expand(runs: NDArray[Any]) -> NDArray[Any]:
    """Bin numbers from rows of (first bin, number of bins, samples in each of them)."""
    first, num_bins, per_bin = runs.T
    sizes = num_bins * per_bin
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    bins: NDArray[Any] = np.repeat(first, sizes) + within // np.repeat(per_bin, sizes)
    return bins
