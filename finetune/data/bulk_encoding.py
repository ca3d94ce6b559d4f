"""Many conversations to samples at once, with the result of `SampleBuilder` and at the speed of the tokenizer.

What costs time beside the tokenizer is Python's handling of single tokens. So the texts of some hundred
conversations go to the tokenizer together, which spreads them over threads while the next texts are being
rendered here, and what comes back is laid end to end in flat arrays::

    conversation 7            | conversation 8
    prefix  source  target eos| prefix  source  target eos       parts, in order
      1       23      140   1 |   1       310     75    1        their lengths
      no      no      yes  yes|   no      no      yes  yes       learned

Only conversations that fit as they are can be treated so. Those that are too long, and pieces in which a
template's text and an example's are mixed, go to `SampleBuilder`, which gets the ids already found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, pairwise
from typing import Any

import numpy as np

from finetune.data.conversation import Conversation
from finetune.data.piece_encoding import PieceEncoder, TextEncoder
from finetune.data.pieces import Piece, Template
from finetune.data.sample_store import CUT_SOURCE, CUT_TARGET, SampleStore
from finetune.data.tokenize import IGNORE_INDEX, Sample, SampleBuilder, TooLongError, has_response

CHUNK_CHARACTERS = 500_000
"""Text that goes to the tokenizer together: enough to keep its threads busy."""

NUM_CHUNKS_AHEAD = 3
"""Chunks rendered before their ids are needed, so that the tokenizer never waits."""


_Ids = Sequence[int] | np.ndarray
_Part = tuple[_Ids, bool]
_OnDropped = Callable[[Conversation, TooLongError | None], None]


class _Remembering:
    """A tokenizer that knows the ids of some texts already."""

    def __init__(self, encoder: TextEncoder):
        self._encoder = encoder
        self.known: dict[str, list[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ids = self.known.get(text)
        return ids if ids is not None else self._encoder.encode(text)


class BulkBuilder:
    """Builds samples as a `SampleBuilder` of the same arguments does.

    Args:
        encoder: The tokenizer; one with a method `encode_many` (texts to the ids of each, the same as from
            `encode`) is used so.
        template: Gives the pieces.
        src_length: As for `SampleBuilder`.
        max_length: As for `SampleBuilder`.
        truncation: As for `SampleBuilder`.
        train_on: As for `SampleBuilder`.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        template: Template,
        *,
        src_length: int,
        max_length: int,
        truncation: str = "left",
        train_on: str = "all",
    ):
        self._encoder, self._template = encoder, template
        self._remembering = _Remembering(encoder)
        self._plain = SampleBuilder(
            self._remembering,  # type: ignore[arg-type]
            template,
            src_length=src_length,
            max_length=max_length,
            truncation=truncation,
            train_on=train_on,
        )
        self._pieces = PieceEncoder(encoder, template)
        self._mark_ids = self._pieces.mark_ids
        self._source_limit = src_length if truncation == "left" else max_length
        self._max_length = max_length
        self._only_last = train_on == "last"

    def build(
        self,
        conversations: Iterable[Conversation],
        on_dropped: _OnDropped,
    ) -> SampleStore:
        """Encodes conversations.

        Args:
            conversations: In the order of the samples.
            on_dropped: Told of each that gives no sample, and the error of those that are too long.
        """
        chunks = self._chunks(iter(conversations))
        return SampleStore.join(
            self._assemble(chunk, encoded, on_dropped) for chunk, encoded in self._encode(chunks)
        )

    def _encode(self, chunks: Iterator[_Chunk]) -> Iterator[tuple[_Chunk, Sequence[_Ids]]]:
        """The ids of the texts of each chunk, one chunk ahead of what is asked for."""
        encode_many = getattr(self._encoder, "encode_many", None)
        if encode_many is None:
            for chunk in chunks:
                yield chunk, [self._encoder.encode(text) for text in chunk.texts]
            return
        with ThreadPoolExecutor(1) as pool:
            waiting: deque[tuple[_Chunk, Future[Sequence[_Ids]]]] = deque()
            for chunk in chunks:
                waiting.append((chunk, pool.submit(encode_many, chunk.texts)))
                if len(waiting) > NUM_CHUNKS_AHEAD:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()

    def _chunks(self, conversations: Iterator[Conversation]) -> Iterator[_Chunk]:
        chunk = _Chunk()
        while batch := list(islice(conversations, 16)):
            for conversation in batch:
                self._add(chunk, conversation)
            if chunk.num_characters >= CHUNK_CHARACTERS:
                yield chunk
                chunk = _Chunk()
        if chunk.conversations:
            yield chunk

    def _add(self, chunk: _Chunk, conversation: Conversation) -> None:
        """Render a conversation, and note which of its texts the tokenizer has to encode."""
        if conversation.is_text:
            pieces, appends_eos = [Piece(conversation.messages[0].content, learned=True)], True
        else:
            pieces, appends_eos = self._template.render(conversation), self._template.appends_eos
        chunk.conversations.append(conversation)
        chunk.pieces.append((pieces, appends_eos))
        for piece in pieces:
            if not piece.special:
                text = self._pieces.plain_text(piece)
                chunk.texts.append(text)
                chunk.num_characters += len(text)

    def _assemble(self, chunk: _Chunk, encoded: Sequence[_Ids], on_dropped: _OnDropped) -> SampleStore:
        layout = _Layout()
        arrays = [np.asarray(ids, dtype=np.int32) for ids in encoded]
        has_marks = self._has_marks(arrays)
        place = 0
        for conversation, (pieces, appends_eos) in zip(chunk.conversations, chunk.pieces, strict=True):
            start, place = place, place + sum(not piece.special for piece in pieces)
            if not has_response(conversation, only_last=self._only_last):
                on_dropped(conversation, None)
                continue
            parts = None
            if not has_marks or not self._has_marks(arrays[start:place]):
                parts = self._lay_out(pieces, arrays[start:place], appends_eos)
            if parts is not None and self._may_stay(conversation, parts):
                layout.add(parts)
                continue
            self._remembering.known = {
                text: ids.tolist()
                for text, ids in zip(chunk.texts[start:place], arrays[start:place], strict=True)
            }
            try:
                sample = self._plain.sample(conversation)
            except TooLongError as error:
                on_dropped(conversation, error)
                continue
            if sample is None:
                on_dropped(conversation, None)
            else:
                layout.add_sample(sample)
        return layout.finish()

    def _has_marks(self, arrays: Sequence[np.ndarray]) -> bool:
        """Whether the tokenizer has taken an example's text for one of the template's special tokens."""
        if not self._mark_ids or not arrays:
            return False
        ids = np.concatenate(arrays)
        return any(bool(np.any(ids == mark)) for mark in self._mark_ids)

    def _lay_out(
        self, pieces: Sequence[Piece], encoded: Sequence[np.ndarray], appends_eos: bool
    ) -> list[_Part] | None:
        """The tokens of a conversation, part by part; None where that takes more than joining."""
        eos = self._encoder.eos_token_id
        parts: list[_Part] = [(self._encoder.prefix_ids, False)]
        texts = iter(encoded)
        end = last_run = 0
        was_learned = False
        for position, piece in enumerate(pieces):
            if not piece.special:
                ids: _Ids = next(texts)
            elif piece.data:
                return None
            else:
                ids = self._pieces.special_ids(piece)
            if piece.learned and not was_learned:
                last_run = len(parts)
            was_learned = piece.learned
            if not len(ids):
                if piece.learned:
                    return None
                continue
            parts.append((ids, piece.learned))
            if piece.learned:
                ends_run = position + 1 == len(pieces) or not pieces[position + 1].learned
                if appends_eos and ends_run and ids[-1] != eos:
                    parts.append(((eos,), True))
                end = len(parts)
        del parts[end:]
        if self._only_last:
            parts[:last_run] = [(ids, False) for ids, _ in parts[:last_run]]
        if self._opens_with_prefix(parts[1:]):
            del parts[0]
        return parts

    def _opens_with_prefix(self, parts: Sequence[_Part]) -> bool:
        """Whether the template has written the ids that frame a prompt already."""
        prefix = self._encoder.prefix_ids
        if not prefix or not parts or parts[0][0][0] != prefix[0]:
            return False
        head = [
            (int(index), learned) for ids, learned in parts[: len(prefix)] for index in ids[: len(prefix)]
        ]
        head = head[: len(prefix)]
        return tuple(index for index, _ in head) == prefix and not any(learned for _, learned in head)

    def _may_stay(self, conversation: Conversation, parts: Sequence[_Part]) -> bool:
        """Whether these parts are a sample already: nothing too long, and something but EOS to learn."""
        num_tokens = num_source_tokens = 0
        teaches, in_source = False, True
        for ids, learned in parts:
            if learned:
                in_source = False
                # The first token of all follows no other, and is not learned.
                teaches = teaches or (ids[-1] != self._encoder.eos_token_id and num_tokens + len(ids) > 1)
            elif in_source:
                num_source_tokens += len(ids)
            num_tokens += len(ids)
        if not teaches or num_tokens > self._max_length:
            return False
        return num_source_tokens <= self._source_limit or conversation.num_rounds > 1


class _Chunk:
    """Conversations that go to the tokenizer together."""

    def __init__(self) -> None:
        self.conversations: list[Conversation] = []
        self.pieces: list[tuple[list[Piece], bool]] = []
        self.texts: list[str] = []
        self.num_characters = 0


class _Layout:
    """The parts of many samples, end to end."""

    def __init__(self) -> None:
        self._ids: list[_Ids] = []
        self._learned: list[bool] = []
        self._num_parts: list[int] = []
        self._cuts: list[int] = []
        self._dropped_rounds: list[int] = []

    def add(
        self,
        parts: Sequence[_Part],
        cuts: int = 0,
        num_dropped_rounds: int = 0,
    ) -> None:
        """Add a sample, given by its tokens before the shift."""
        for ids, learned in parts:
            self._ids.append(ids)
            self._learned.append(learned)
        self._num_parts.append(len(parts))
        self._cuts.append(cuts)
        self._dropped_rounds.append(num_dropped_rounds)

    def add_sample(self, sample: Sample) -> None:
        """Add a sample that has been made one by one."""
        learned = np.append(False, sample.labels != IGNORE_INDEX)
        # The last token is not an input; where it is not learned either, any will do.
        tokens = np.append(sample.input_ids, np.int32(sample.labels[-1] if learned[-1] else 0))
        borders = [0, *(np.flatnonzero(learned[1:] != learned[:-1]) + 1).tolist(), len(tokens)]
        parts = [(tokens[start:stop], bool(learned[start])) for start, stop in pairwise(borders)]
        cuts = CUT_SOURCE * sample.truncated_source + CUT_TARGET * sample.truncated_target
        self.add(parts, cuts, sample.num_dropped_rounds)

    def finish(self) -> SampleStore:
        """The samples."""
        tokens = _flatten(self._ids)
        lengths = np.fromiter(map(len, self._ids), np.int64, len(self._ids))
        learned = np.repeat(np.array(self._learned, dtype=bool), lengths)
        ends = np.cumsum(lengths)
        last_parts = np.cumsum(np.array(self._num_parts, dtype=np.int64)) - 1
        offsets = np.concatenate([np.zeros(1, np.int64), ends[last_parts]])
        learned[offsets[:-1]] = False
        return SampleStore(
            {
                "tokens": tokens,
                "learned": learned,
                "offsets": offsets,
                "cuts": np.array(self._cuts, dtype=np.uint8),
                "dropped_rounds": np.array(self._dropped_rounds, dtype=np.int32),
            }
        )


def _flatten(parts: Sequence[_Ids]) -> np.ndarray:
    """int32, all ids in a row."""
    if not parts:
        return np.zeros(0, np.int32)
    return np.concatenate([np.asarray(ids, dtype=np.int32) for ids in parts])
