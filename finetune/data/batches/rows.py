"""From sample numbers to what the model is called with: padded rows or packed rows.

Both kinds answer the same questions, so the trainer and the loss evaluation do not know which
one they use. A unit is what the order of the samples counts: a sample, or a bin of samples.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.data.batches.collate import collate, collate_packed
from finetune.data.packing.packing import PackedSamples
from finetune.data.samples.sample_store import count_label_tokens, sample_lengths
from finetune.data.samples.tokenize import IGNORE_INDEX, Sample

_MODEL_INPUTS = ("input_ids", "position_ids", "attn_mask_startend_row_indices")


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        inputs: Arguments of the model by name, NumPy arrays [batch, length, ...].
        labels: int64 [batch, length]; IGNORE_INDEX where nothing is learned.
        segments: For each row its samples in a row: (tokens, sample index).
        num_tokens: Tokens that are not padding.
        num_label_tokens: Labels that are not IGNORE_INDEX.
        weight: 0.0 for a batch that only keeps a rank in step with the others, else 1.0.
        mask_segments: int32 [batch, segments], the lengths of what a dense mask keeps apart in each row, 0 where a
            row has fewer; None where no dense mask is wanted.
        mask_trunks: int32 [batch, segments], the segment that each goes on from (see
            `finetune.data.batches.collate.block_mask`); None where all begin anew.
    """

    inputs: dict[str, NDArray[Any]]
    labels: NDArray[Any]
    segments: list[list[tuple[int, int]]]
    num_tokens: int
    num_label_tokens: int
    weight: float = 1.0
    mask_segments: NDArray[Any] | None = None
    mask_trunks: NDArray[Any] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and tokens of each with padding."""
        num_rows, length = self.labels.shape
        return num_rows, length

    def idle(self) -> Batch:
        """This batch as one that counts nothing, for a rank that has no samples of its own left."""
        return replace(self, num_tokens=0, num_label_tokens=0, weight=0.0)

    def tensors(self) -> dict[str, Any]:
        """The arguments of the model as Paddle tensors; a dense mask, where one is wanted, is made on the device."""
        import paddle

        from finetune.data.batches.segment_mask import make_block_mask

        tensors = {name: paddle.to_tensor(array) for name, array in self.inputs.items()}
        if self.mask_segments is not None:
            tensors["attention_mask"] = make_block_mask(self.mask_segments, self.shape[1], self.mask_trunks)
        return tensors


class Rows(Protocol):
    """Units that become rows of a batch."""

    @property
    def lengths(self) -> NDArray[Any]:
        """int64 [units], tokens of each unit."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: NDArray[Any]) -> Batch:
        """The rows of some units."""
        ...

    def count_label_tokens(self, indices: NDArray[Any]) -> int:
        """Labels of some units that are not IGNORE_INDEX; no row is made for it."""
        ...

    def fingerprint(self) -> str:
        """Changes when the samples do."""
        ...


class PaddedRows:
    """One sample a row, padded on the right up to the longest.

    Attention is causal, so no token ever sees padding and the model needs no mask.

    Args:
        samples: The data set.
        pad_token_id: Fills rows.
        pad_to_multiple_of: Rounds row lengths up, or None.
    """

    def __init__(
        self, samples: Sequence[Sample], *, pad_token_id: int, pad_to_multiple_of: int | None = None
    ):
        self.samples = samples
        self._padding: dict[str, Any] = {
            "pad_token_id": pad_token_id,
            "pad_to_multiple_of": pad_to_multiple_of,
        }

    def __len__(self) -> int:
        return len(self.samples)

    @functools.cached_property
    def lengths(self) -> NDArray[Any]:
        """int64 [samples], tokens of each sample."""
        return sample_lengths(self.samples)

    def count_label_tokens(self, indices: NDArray[Any]) -> int:
        """Labels of some samples that are not IGNORE_INDEX."""
        return count_label_tokens(self.samples, indices)

    def fingerprint(self) -> str:
        """Changes when the samples do."""
        return hash_samples(self.samples)

    def batch(self, indices: NDArray[Any]) -> Batch:
        """The rows of some samples."""
        arrays = collate([self.samples[i] for i in indices], **self._padding)
        segments = [
            [(int(length), int(index))] for length, index in zip(arrays["lengths"], indices, strict=True)
        ]
        return _to_batch(arrays, segments, names=("input_ids",))


class PackedRows:
    """Several whole samples a row (InTokens); attention and positions keep them apart.

    Args:
        packed: The bins.
        pad_token_id: Fills rows.
        pad_to_multiple_of: Rounds row lengths up, or None.
        mask: "block" (dense) or "start_end" (indices for PaddleNLP's flash-mask attention).
    """

    def __init__(
        self,
        packed: PackedSamples,
        *,
        pad_token_id: int,
        pad_to_multiple_of: int | None = None,
        mask: str = "block",
    ):
        self.packed = packed
        self._options: dict[str, Any] = {
            "pad_token_id": pad_token_id,
            "pad_to_multiple_of": pad_to_multiple_of,
            "mask": None if mask == "block" else mask,
        }
        self._is_masked = mask == "block"

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def lengths(self) -> NDArray[Any]:
        """int64 [bins], tokens of each bin."""
        return self.packed.lengths

    def count_label_tokens(self, indices: NDArray[Any]) -> int:
        """Labels of some bins that are not IGNORE_INDEX."""
        samples = [self.packed.packing[int(i)] for i in indices]
        return count_label_tokens(self.packed.samples, np.concatenate(samples))

    def fingerprint(self) -> str:
        """Changes when the samples do."""
        return hash_samples(self.packed.samples)

    def batch(self, indices: NDArray[Any]) -> Batch:
        """The rows of some bins."""
        arrays = collate_packed([self.packed[int(i)] for i in indices], **self._options)
        segments = [
            [(int(length), int(index)) for length, index in zip(lengths, row, strict=True) if length]
            for lengths, row in zip(arrays["segment_lengths"], arrays["sample_indices"], strict=True)
        ]
        batch = _to_batch(arrays, segments, names=_MODEL_INPUTS)
        if not self._is_masked:
            return batch
        return replace(batch, mask_segments=arrays["segment_lengths"].astype(np.int32))


def hash_samples(samples: Sequence[Sample]) -> str:
    """Hash over the token ids and labels of all samples, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(sample.input_ids.tobytes())
        digest.update(sample.labels.tobytes())
    return digest.hexdigest()


def _to_batch(
    arrays: dict[str, NDArray[Any]], segments: list[list[tuple[int, int]]], *, names: Sequence[str]
) -> Batch:
    return Batch(
        inputs={name: arrays[name] for name in names if name in arrays},
        labels=arrays["labels"],
        segments=segments,
        num_tokens=int(arrays["lengths"].sum()),
        num_label_tokens=int(np.count_nonzero(arrays["labels"] != IGNORE_INDEX)),
    )
