"""The exported program: prompt and settings in, up to N new tokens and the cache out.

One graph does both parts of generation. The prompt goes through the decoder once; then a loop inside the
graph makes one token after the other, writing keys and values into a cache of fixed size in place. So a
token costs no call from Python, and no copy of the cache; the caller gets the cache back only when it asks
for more tokens than fit into one run, or shows them as they come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import paddle
from paddle import _C_ops, nn
from paddle.static import InputSpec
from paddle.static.nn import while_loop

from finetune.families.attention import rounded_products
from finetune.families.decoder_description import DecoderDescription
from finetune.serving.decoding.token_choice import Choice, choose_tokens, forbid_tokens, penalise_repetition
from finetune.serving.export.context_positions import ContextPositions
from finetune.serving.export.packed_layers import GraphMatrix
from finetune.serving.export.transformer import Decoder, KeyValue


class GenerationGraph(nn.Layer):
    """What is traced and saved; see `forward` for inputs and outputs.

    Args:
        description: The decoder.
        dtype: Of weights and cache.
        matrices: Role -> packed matrix of every layer; None: as described.
    """

    def __init__(
        self,
        description: DecoderDescription,
        dtype: str,
        matrices: Sequence[Mapping[str, GraphMatrix]] | None = None,
    ):
        super().__init__()
        self.shape = description.shape
        self.decoder = Decoder(description, dtype, matrices)
        self.dtype = dtype
        marks = description.shape.context_marks
        self.contexts = None if marks is None else ContextPositions(marks)

    def input_spec(self) -> list[Any]:
        """Names and shapes of the inputs, in their order."""
        cache = [1, self.shape.num_kv_heads, None, None, self.shape.head_dim]
        pasts = [
            InputSpec(cache, self.dtype, f"past_{kind}_{number}")
            for number in range(self.shape.num_layers)
            for kind in ("key", "value")
        ]
        marks = [] if self.contexts is None else [InputSpec([None, 3], "int64", "marks")]
        return [
            InputSpec([None, None], "int64", "ids"),
            InputSpec([None], "int64", "padding"),
            InputSpec([None, None], "int64", "history"),
            InputSpec([None, 1], "bool", "finished"),
            InputSpec([None, None], "float32", "draws"),
            InputSpec([4], "int64", "counts"),
            InputSpec([3], "float32", "factors"),
            InputSpec([None], "int64", "stop_ids"),
            pasts,
            *marks,
        ]

    def forward(
        self, ids: Any, padding: Any, history: Any, finished: Any, draws: Any, counts: Any, factors: Any,
        stop_ids: Any, pasts: list[Any], marks: Any = None,
    ) -> list[Any]:  # fmt: skip
        """Tokens [B, N], finished [B, 1], then keys and values of every layer [1, K, B, P + S + N - 1, D].

        Args:
            ids: [B, S], the tokens that the cache does not hold yet, at least one.
            padding: [B], columns in front of a row's first token.
            history: [B, H], tokens of the row whose repetition is penalised; never padding.
            finished: [B, 1], rows that have ended.
            draws: [B, N], numbers in [0, 1) that sampling uses; N is the number of tokens to make.
            counts: top_k (1: the most probable token), tokens before which a row may not end, the id that
                fills finished rows, columns of a trained prefix in front of the cache.
            factors: Temperature, top_p, repetition penalty.
            stop_ids: Ids that end a row.
            pasts: Keys and values so far, [1, K, B, P, D], P may be 0.
            marks: [B, 3], where the rows' texts have their marks; see `ContextPositions`. None for other models.
        """
        start = _size(pasts[0], 3)  # P
        end = start + _size(ids, 1)  # the column of the first new token
        choice = Choice(counts, factors, stop_ids, draws)
        loop = _Loop(self, choice, padding, end=end, history_end=_size(history, 1))
        places = paddle.arange(start, end).unsqueeze(0) - loop.first.unsqueeze(1)
        logits, caches = self.decoder(
            ids,
            loop.positions(places.clip(min=0), marks),
            loop.prompt_masks(start, marks),
            _pairs(pasts),
            _extend,
        )
        caches = self._with_room(caches, _size(ids, 0), loop.num_steps - 1)
        # Room for the new tokens, filled with one that is there already: it changes no penalty.
        history = paddle.concat([history, history[:, -1:].expand([-1, loop.num_steps])], axis=1)
        tokens = paddle.full(paddle.stack([_size(ids, 0), loop.num_steps]), 0, "int64") + choice.filler
        first = paddle.full([], 0, "int64")
        state = loop.take(logits, first, finished, tokens, history)
        given = [] if marks is None else [marks]
        state = while_loop(loop.must_continue, loop.advance, [first + 1, *state, *caches, *given])
        return [state[3], state[2], *state[5 : len(state) - len(given)]]

    def _with_room(self, caches: list[KeyValue], batch: Any, columns: Any) -> list[Any]:
        """Keys and values of all layers in one list, with columns for the tokens of the loop."""
        sizes = [paddle.full([], each, "int64") for each in (1, self.shape.num_kv_heads, self.shape.head_dim)]
        room = paddle.zeros(paddle.stack([sizes[0], sizes[1], batch, columns, sizes[2]]), self.dtype)
        return [paddle.concat([each, room], axis=3) for pair in caches for each in pair]


class _Loop:
    """One token after the other, behind the prompt.

    Args:
        graph: What runs.
        choice: Settings of the run.
        padding: [B], columns in front of a row's first token.
        end: The column of the first new token.
        history_end: The column of the first new token in the history.

    Attributes:
        num_steps: Tokens to make.
        first: [B], the column of a row's first token.
    """

    def __init__(self, graph: GenerationGraph, choice: Choice, padding: Any, *, end: Any, history_end: Any):
        self.decoder, self.window, self.contexts = graph.decoder, graph.shape.window, graph.contexts
        self.num_kv_heads = graph.shape.num_kv_heads
        self.kinds = {layer.has_window for layer in graph.decoder.layers}
        self.choice, self.end, self.history_end = choice, end, history_end
        self.num_steps = _size(choice.draws, 1)
        self.first = padding + choice.num_prefix
        self.columns = paddle.arange(end + self.num_steps - 1)  # [T]
        self.never = paddle.full([], float(paddle.finfo(paddle.float32).min), "float32")
        self.keys = self._key_mask(padding)

    def _key_mask(self, padding: Any) -> Any:
        """What every key adds to the scores whoever asks, float32: [B, 1, T], or [G, K, B, 1, T]."""
        in_prefix = self.columns < self.choice.num_prefix
        padding = padding.unsqueeze(1)
        real = in_prefix | (self.columns >= self.first.unsqueeze(1))  # [B, T]
        if self.decoder.slopes is None:
            return paddle.where(real, paddle.zeros([]), self.never).unsqueeze(1)
        places = paddle.where(in_prefix, self.columns, self.columns - padding).astype("float32")
        # Query head i belongs to group i % G of key and value head i // G.
        slopes = self.decoder.slopes.reshape([self.num_kv_heads, -1]).transpose([1, 0])  # [G, K]
        slopes, places = slopes.reshape([0, 0, 1, 1, 1]), places.unsqueeze(1)
        divisor = self.decoder.rounded_divisor
        added = slopes * places if divisor is None else rounded_products(slopes, places) / divisor
        return paddle.where(real.unsqueeze(1), added, self.never)

    def positions(self, places: Any, marks: Any) -> Any:
        """What the decoder gets as positions of tokens at places [B, S] of their texts."""
        return places if self.contexts is None else self.contexts.positions(places, marks)

    def _masks(self, queries: Any, columns: Any, keys: Any, contexts: Any = None) -> dict[bool, Any]:
        """Hides what comes behind a query, in layers with a window also what lies before that; contexts are seen."""
        visible = columns <= queries
        if contexts is not None:
            visible = visible | contexts
        masks = {}
        for narrow in self.kinds:
            seen = visible & (columns > queries - self.window) if narrow else visible
            masks[narrow] = paddle.where(seen, keys, self.never)
        return masks

    def prompt_masks(self, start: Any, marks: Any) -> dict[bool, Any]:
        """The masks of all new tokens of the prompt, [B, S, P + S], of layers without and with a window."""
        queries = paddle.arange(start, self.end).unsqueeze(1)
        columns, contexts = paddle.arange(self.end), None
        if self.contexts is not None:
            contexts = self.contexts.contexts(columns - self.first.unsqueeze(1), marks)
        return self._masks(queries, columns, self.keys[..., : self.end], contexts)

    def take(self, logits: Any, step: Any, finished: Any, tokens: Any, history: Any) -> list[Any]:
        """Chooses the tokens of a step; returns them [B, 1], finished [B, 1], all tokens and the history."""
        choice = self.choice
        logits = penalise_repetition(logits[:, 0], history, choice)
        chosen = choose_tokens(forbid_tokens(logits, step, choice), step, choice)
        chosen = paddle.where(finished, choice.filler, chosen)
        ended = (chosen == choice.stop_ids.unsqueeze(0)).any(axis=1, keepdim=True)
        tokens = _write(tokens, chosen, step, axis=1)
        history = _write(history, chosen, self.history_end + step, axis=1)
        return [chosen, finished | ended, tokens, history]

    def must_continue(self, step: Any, chosen: Any, finished: Any, *state: Any) -> Any:
        """Whether tokens are left to make and rows to make them for."""
        return (step < self.num_steps) & ~finished.all()

    def advance(
        self, step: Any, chosen: Any, finished: Any, tokens: Any, history: Any, *rest: Any
    ) -> list[Any]:
        """One token for every row."""
        place = self.end + step - 1

        def store(past: KeyValue, new: KeyValue) -> KeyValue:
            return _write(past[0], new[0], place, axis=3), _write(past[1], new[1], place, axis=3)

        places = (place - self.first).unsqueeze(1)
        marks, caches = None, rest
        if self.contexts is not None:
            marks, caches = self.contexts.with_token(rest[-1], chosen, places), rest[:-1]
        masks = self._masks(place, self.columns, self.keys)
        logits, pairs = self.decoder(chosen, self.positions(places, marks), masks, _pairs(caches), store)
        state = self.take(logits, step, finished, tokens, history)
        given = [] if marks is None else [marks]
        return [step + 1, *state, *(each for pair in pairs for each in pair), *given]


def _pairs(flat: Any) -> list[KeyValue]:
    return [(flat[place], flat[place + 1]) for place in range(0, len(flat), 2)]


def _extend(past: KeyValue, new: KeyValue) -> KeyValue:
    return paddle.concat([past[0], new[0]], axis=3), paddle.concat([past[1], new[1]], axis=3)


def _write(target: Any, value: Any, place: Any, *, axis: int) -> Any:
    """Puts one slice into a tensor, in place."""
    return _C_ops.set_value_with_tensor_(  # type: ignore[attr-defined]
        target, value, [place], [place + 1], [1], [axis], [], []
    )


def _size(tensor: Any, axis: int) -> Any:
    return paddle.shape(tensor)[axis].astype("int64")
