"""Rows that PaddleNLP's layers decode together, one token of each a step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from finetune.serving.batching.caches import CacheForm, find_form
from finetune.serving.batching.row import Row
from finetune.serving.batching.row_tokens import choose_row_tokens
from finetune.serving.predict.dynamic import DynamicDecoder

_ROW_TENSORS = ("position_ids", "context_marks")
"""The rest of the state, [rows, ...]; most families have positions only."""
_CACHES = ("past_key_values", "cache")
"""How families call their cache; some call one cache both."""


class DynamicRows:
    """Makes batches of a model.

    Args:
        decoder: The model.
    """

    def __init__(self, decoder: DynamicDecoder):
        self.decoder = decoder
        self._form: CacheForm | None = None

    def inference(self) -> AbstractContextManager[None]:
        """What the thread needs that uses this object."""
        return self.decoder.inference()

    def batch_of(self, row: Row) -> Hashable:
        """Which rows can share a batch: those for which this is equal. All can."""
        return None

    def start(self, rows: Sequence[Row]) -> tuple[DynamicBatch, list[list[int]]]:
        """Reads what some rows have in common.

        Args:
            rows: At least one; all with the same tokens so far.

        Returns:
            A batch of these rows, and the next tokens of each.
        """
        logits, state = self.decoder.read_prompts([rows[0].all_ids])
        batch = DynamicBatch(self, rows[:1], state)
        if len(rows) > 1:
            logits = logits.expand([len(rows), -1])
            batch = batch.keep([0] * len(rows))
            batch.rows = list(rows)
        return batch, [[token] for token in choose_row_tokens(logits, rows)]

    @property
    def form(self) -> CacheForm:
        """How the model lays its cache out."""
        if self._form is None:
            # Any token will do: only shapes are looked at.
            self._form = find_form(
                lambda num_rows, length: _cache(self.decoder.read_prompts([[0] * length] * num_rows)[1])
            )
        return self._form


class DynamicBatch:
    """Rows and the state of the model behind their last tokens but one.

    Attributes:
        rows: In the order of the state's.
    """

    def __init__(self, maker: DynamicRows, rows: Sequence[Row], state: dict[str, Any]):
        self.rows = list(rows)
        self._maker, self._state = maker, state

    def step(self) -> list[list[int]]:
        """One more token of every row."""
        last = [row.tokens[-1] for row in self.rows]
        logits, self._state = self._maker.decoder.read_tokens(last, self._state)
        return [[token] for token in choose_row_tokens(logits, self.rows)]

    def join(self, other: DynamicBatch) -> DynamicBatch:
        """The rows of both."""
        import paddle

        states = self._state, other._state
        form, masks = self._maker.form, [state["attention_mask"] for state in states]
        width = max(mask.shape[1] for mask in masks)
        masks = [_pad(mask.astype("int64"), width - mask.shape[1]) for mask in masks]
        return self._with(
            [*self.rows, *other.rows],
            form.join([_cache(state) for state in states]),
            paddle.concat(masks),
            {name: paddle.concat([state[name] for state in states]) for name in self._row_tensors()},
        )

    def keep(self, places: Sequence[int]) -> DynamicBatch:
        """The rows at some places, without the columns in which none of them has a token."""
        import paddle

        form, index = self._maker.form, paddle.to_tensor(list(places), "int64")
        mask = paddle.index_select(self._state["attention_mask"].astype("int64"), index)
        empty = int(mask.shape[1] - mask.sum(axis=1).max())
        return self._with(
            [self.rows[place] for place in places],
            form.trim(form.keep(_cache(self._state), places), empty),
            mask[:, empty:],
            {name: paddle.index_select(self._state[name], index) for name in self._row_tensors()},
        )

    def _row_tensors(self) -> list[str]:
        return [name for name in _ROW_TENSORS if name in self._state]

    def _with(self, rows: Sequence[Row], cache: Any, mask: Any, others: dict[str, Any]) -> DynamicBatch:
        state = {**self._state, "attention_mask": mask, **others}
        state |= {name: cache for name in _CACHES if name in state}
        return DynamicBatch(self._maker, rows, state)


def _cache(state: dict[str, Any]) -> Any:
    return next(state[name] for name in _CACHES if state.get(name) is not None)


def _pad(mask: Any, num_columns: int) -> Any:
    import paddle

    if not num_columns:
        return mask
    return paddle.concat([paddle.zeros([mask.shape[0], num_columns], mask.dtype), mask], axis=1)
