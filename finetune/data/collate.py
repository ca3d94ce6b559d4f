"""From samples to the padded arrays of one micro-batch.

Right padding for training (a causal model never looks to the right, so padding changes nothing), left
padding for generation (the last column is then the newest token of every row).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune.data.tokenize import IGNORE_INDEX, Prompt, Sample


def collate(
    samples: Sequence[Sample], *, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, np.ndarray]:
    """Pad samples on the right.

    Args:
        samples: B of them, at least one.
        pad_token_id: Fills input_ids.
        pad_to_multiple_of: Rounds the row length L up; None leaves the longest sample's.

    Returns:
        int64 arrays: ``input_ids``, ``labels`` (`IGNORE_INDEX` in the padding), ``attention_mask``
        (1 for tokens), ``position_ids`` (0 in the padding), each [B, L], and ``lengths`` [B].
    """
    lengths = _lengths([sample.input_ids for sample in samples])
    row_length = int(lengths.max())
    if pad_to_multiple_of:
        row_length = -(-row_length // pad_to_multiple_of) * pad_to_multiple_of
    columns = np.arange(row_length, dtype=np.int64)
    mask = columns < lengths[:, None]  # [B, L]
    return {
        "input_ids": _fill(mask, [sample.input_ids for sample in samples], pad_token_id),
        "labels": _fill(mask, [sample.labels for sample in samples], IGNORE_INDEX),
        "attention_mask": mask.astype(np.int64),
        "position_ids": columns * mask,
        "lengths": lengths,
    }


def collate_prompts(prompts: Sequence[Prompt], *, pad_token_id: int) -> dict[str, np.ndarray]:
    """Pad prompts on the left.

    Args:
        prompts: B of them, at least one.
        pad_token_id: Fills input_ids.

    Returns:
        int64 [B, L]: ``input_ids``, ``attention_mask`` (1 for tokens) and ``position_ids`` (counting
        from 0 at the first token, 0 in the padding).
    """
    lengths = _lengths([prompt.input_ids for prompt in prompts])
    row_length = int(lengths.max())
    offsets = np.arange(row_length, dtype=np.int64) - (row_length - lengths[:, None])  # [B, L]
    mask = offsets >= 0
    return {
        "input_ids": _fill(mask, [prompt.input_ids for prompt in prompts], pad_token_id),
        "attention_mask": mask.astype(np.int64),
        "position_ids": offsets * mask,
    }


def _lengths(rows: Sequence[np.ndarray]) -> np.ndarray:
    if not rows:
        raise ValueError("a batch needs at least one sample")
    return np.array([len(row) for row in rows], dtype=np.int64)


def _fill(mask: np.ndarray, rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    """Write the rows one after the other where the mask is set: both run in row-major order."""
    filled = np.full(mask.shape, value, dtype=np.int64)
    filled[mask] = np.concatenate(rows)
    return filled
