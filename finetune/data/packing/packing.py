"""Whole samples into rows of a fixed length, so that next to nothing is padding.

A bin holds whole samples ("segments"), one after the other. What is kept of it are indices; tokens are
joined when a bin is asked for, and a mask is built only in `finetune.data.batches.collate`, from segment lengths::

    capacity 12       | sample 7 . . . . | sample 2 . . | 0 . . |      one bin, 12 of 12 tokens
    positions           0 1 2 3 4          0 1 2 3        0 1 2

Samples are shifted already (labels[i] follows input_ids[i]), so no label reaches into the next segment.

`finetune.data.packing.best_fit` decides which lengths go together. Which of the samples of a length goes where,
and the order of the bins, is random by the seed: neither follows the order of the file. (Bins that open
late hold short samples only; being in random order, they do not come last.)

Cost: one million samples (log-normal, median 180, at most 2048 tokens) take 0.15 to 0.3 s on
one core; benchmarks/packing.py measures it, and how much room stays empty.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from finetune.data.packing.best_fit import assign_bins

if TYPE_CHECKING:
    from finetune.data.samples.tokenize import Sample

_STREAM = 0x7061636B  # keeps these random numbers apart from others that are drawn with the same seed
_FULL = 0.999
"""A bin filled to this share is not worth another try."""
_MAX_OPEN = 0.25
"""Largest share of a window's bins that may wait for better company; bounds the work on awkward lengths."""


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Which samples share which bin; indexing gives the sample indices of one bin.

    Attributes:
        capacity: Tokens that fit into a bin.
        order: int64 [samples], sample indices, bin after bin.
        offsets: int64 [bins + 1]; bin b is ``order[offsets[b]:offsets[b + 1]]``.
        num_bin_tokens: int64 [bins], tokens in each bin.
    """

    capacity: int
    order: NDArray[Any]
    offsets: NDArray[Any]
    num_bin_tokens: NDArray[Any]

    def __len__(self) -> int:
        return len(self.num_bin_tokens)

    def __getitem__(self, number: int) -> NDArray[Any]:
        number = range(len(self))[number]
        return self.order[self.offsets[number] : self.offsets[number + 1]]

    @property
    def num_tokens(self) -> int:
        """Tokens in all bins."""
        return int(self.num_bin_tokens.sum())

    @property
    def efficiency(self) -> float:
        """Share of the room that holds tokens, 0 to 1; 1 when there are no bins."""
        return self.num_tokens / (len(self) * self.capacity) if len(self) else 1.0

    def select(self, bins: NDArray[Any]) -> Packing:
        """A packing of some of the bins.

        Args:
            bins: Their numbers, or one bool for each bin.
        """
        counts = np.diff(self.offsets)[bins]
        offsets = _offsets(counts)
        shift = np.repeat(self.offsets[:-1][bins] - offsets[:-1], counts)
        order = self.order[np.arange(offsets[-1]) + shift]
        return Packing(self.capacity, order, offsets, self.num_bin_tokens[bins])


def pack(lengths: NDArray[Any], capacity: int, *, seed: int, window: int | None = None) -> Packing:
    """Distributes samples over bins by best-fit-decreasing.

    Args:
        lengths: Integers [samples], tokens of each sample, 1 to `capacity`.
        capacity: Tokens that fit into a bin.
        seed: Decides the result, together with the other arguments. Not negative.
        window: Packs shuffled portions of at most so many new samples, instead of all at once; each
            portion hands the samples of its poorly filled bins to the next.

    Returns:
        Every sample index once, bins in random order.

    Raises:
        ValueError: A length, the capacity or the window is out of range.
    """
    lengths = _checked_lengths(lengths, capacity)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected at least 1 sample")
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _STREAM])))
    shuffled = generator.permutation(len(lengths))
    if window is None or window >= len(lengths):
        return _pack_shuffled(lengths, shuffled, capacity, generator)
    closed: list[Packing] = []
    waiting = shuffled[:0]
    num_windows = -(-len(lengths) // window)
    for portion in np.array_split(shuffled, num_windows):  # nearly equal: no small rest at the end
        packing = _pack_shuffled(lengths, np.concatenate([waiting, portion]), capacity, generator)
        if len(closed) + 1 < num_windows:
            packing, waiting = split_open(packing)
        closed.append(packing)
    return _join(closed).select(generator.permutation(sum(map(len, closed))))


def split_open(packing: Packing) -> tuple[Packing, NDArray[Any]]:
    """Separate the bins that are as good as full from those that more samples could fill better.

    For packing in portions: pack the samples left over again, together with the next portion.

    Returns:
        The packing without its open bins, at least 3/4 of all, and the sample indices of the open ones.
    """
    num_open = min(
        np.count_nonzero(packing.num_bin_tokens < _FULL * packing.capacity), int(_MAX_OPEN * len(packing))
    )
    is_open = np.zeros(len(packing), dtype=bool)
    is_open[np.argsort(packing.num_bin_tokens, kind="stable")[:num_open]] = True
    return packing.select(~is_open), packing.select(is_open).order


@dataclass(frozen=True, slots=True, eq=False)
class Bin:
    """S whole samples in a row, T tokens together; never a mask.

    Attributes:
        input_ids: int32 [T].
        labels: int32 [T].
        segment_lengths: int32 [S], tokens of each sample.
        sample_indices: int64 [S], which samples they are.
    """

    input_ids: NDArray[Any]
    labels: NDArray[Any]
    segment_lengths: NDArray[Any]
    sample_indices: NDArray[Any]


class PackedSamples(Sequence[Bin]):
    """The bins of a packing, each built when it is asked for.

    Args:
        samples: What was packed.
        packing: Indices into it.
    """

    def __init__(self, samples: Sequence[Sample], packing: Packing):
        self.samples = samples
        self.packing = packing

    def __len__(self) -> int:
        return len(self.packing)

    @overload
    def __getitem__(self, number: int) -> Bin: ...

    @overload
    def __getitem__(self, number: slice) -> list[Bin]: ...

    def __getitem__(self, number: int | slice) -> Bin | list[Bin]:
        if isinstance(number, slice):
            return [self[index] for index in range(len(self))[number]]
        indices = self.packing[number]
        samples = [self.samples[index] for index in indices.tolist()]
        return Bin(
            input_ids=np.concatenate([sample.input_ids for sample in samples]),
            labels=np.concatenate([sample.labels for sample in samples]),
            segment_lengths=np.array([len(sample.input_ids) for sample in samples], dtype=np.int32),
            sample_indices=indices,
        )

    @property
    def lengths(self) -> NDArray[Any]:
        """int64 [bins], tokens of each bin; no bin is built for it."""
        return self.packing.num_bin_tokens

    @functools.cached_property
    def num_label_tokens(self) -> NDArray[Any]:
        """int64 [bins], tokens of each bin that carry a label."""
        counts = np.fromiter((sample.num_label_tokens for sample in self.samples), np.int64)
        return _sum_bins(counts[self.packing.order], self.packing.offsets)


def _checked_lengths(lengths: NDArray[Any], capacity: int) -> NDArray[Any]:
    lengths = np.asarray(lengths)
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}, expected at least 1 token")
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu"):
        raise ValueError(f"lengths is {lengths.dtype} of shape {lengths.shape}, expected integers [samples]")
    is_wrong = (lengths < 1) | (lengths > capacity)
    if is_wrong.any():
        first = int(is_wrong.argmax())
        raise ValueError(
            f"sample {first} has {lengths[first]} tokens where a bin takes 1 to {capacity} (so do "
            f"{np.count_nonzero(is_wrong)} in all): samples are truncated or dropped before they are packed"
        )
    return lengths.astype(np.int64, copy=False)


def _pack_shuffled(
    lengths: NDArray[Any], indices: NDArray[Any], capacity: int, generator: np.random.Generator
) -> Packing:
    """Packs the samples with these indices, dealt out in this order within equal lengths."""
    own_lengths = lengths[indices]
    indices = indices[_argsort_stable(capacity - own_lengths)]  # longest first
    bin_of_sample = assign_bins(np.bincount(own_lengths), capacity)
    num_bins = int(bin_of_sample.max(initial=-1)) + 1
    bin_of_sample = generator.permutation(num_bins)[bin_of_sample]
    offsets = _offsets(np.bincount(bin_of_sample, minlength=num_bins))
    order = indices[_argsort_stable(bin_of_sample)]
    return Packing(capacity, order, offsets, _sum_bins(lengths[order], offsets))


def _argsort_stable(keys: NDArray[Any]) -> NDArray[Any]:
    """np.argsort(keys, kind="stable") for keys >= 0: NumPy's radix sort, 16 bits a time, is 2 to 3 times faster."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    rest = keys >> 16
    return order[_argsort_stable(rest[order])] if rest.any() else order


def _join(packings: Sequence[Packing]) -> Packing:
    return Packing(
        packings[0].capacity,
        np.concatenate([packing.order for packing in packings]),
        _offsets(np.concatenate([np.diff(packing.offsets) for packing in packings])),
        np.concatenate([packing.num_bin_tokens for packing in packings]),
    )


def _offsets(counts: NDArray[Any]) -> NDArray[Any]:
    offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64, copy=False)
    return offsets


def _sum_bins(values: NDArray[Any], offsets: NDArray[Any]) -> NDArray[Any]:
    """Sums of the values [samples, in packed order] of each bin; no bin is empty."""
    return np.add.reduceat(values, offsets[:-1]) if len(offsets) > 1 else values[:0]
