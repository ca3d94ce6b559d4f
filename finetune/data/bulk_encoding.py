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

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol

import numpy as np

from finetune.data.conversation import Conversation
from finetune.data.piece_encoding import PieceEncoder, TextEncoder
from finetune.data.pieces import Piece, Template
from finetune.data.sample_store import CUT_SOURCE, CUT_TARGET, SampleStore
from finetune.data.tokenize import IGNORE_INDEX, Sample, SampleBuilder, TooLongError, has_response

CHUNK_CHARACTERS = 1_000_000
"""Text that goes to the tokenizer together: enough to keep its threads busy, little enough to hold twice."""


class BulkEncoder(TextEncoder, Protocol):
    """A tokenizer that takes many texts at a time."""

    def encode_many(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """The ids of each text, the same as `encode` gives."""
        ...


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
        encoder: The tokenizer.
        template: Gives the pieces.
        src_length: As for `SampleBuilder`.
        max_length: As for `SampleBuilder`.
        truncation: As for `SampleBuilder`.
        train_on: As for `SampleBuilder`.
    """

    def __init__(
        self,
        encoder: BulkEncoder,
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
        self._source_limit = src_length if truncation == "left" else max_length
        self._max_length = max_length
        self._only_last = train_on == "last"

    def build(
        self,
        conversations: Iterable[Conversation],
        on_dropped: Callable[[Conversation, TooLongError | None], None],
    ) -> SampleStore:
        """Encodes conversations.

        Args:
            conversations: In the order of the samples.
            on_dropped: Told of each that gives no sample, and the error of those that are too long.
        """
        parts = []
        with ThreadPoolExecutor(1) as pool:
            waiting: list[tuple[_Chunk, Future]] = []
            for chunk in self._chunks(iter(conversations)):
                waiting.append((chunk, pool.submit(self._encoder.encode_many, chunk.texts)))
                if len(waiting) > 1:
                    first, future = waiting.pop(0)
                    parts.append(self._assemble(first, future.result(), on_dropped))
            parts += [self._assemble(first, future.result(), on_dropped) for first, future in waiting]
        return SampleStore.join(parts)

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
        texts = []
        for piece in pieces:
            if not piece.special:
                texts.append(self._pieces.plain_text(piece))
        chunk.conversations.append(conversation)
        chunk.pieces.append((pieces, appends_eos))
        chunk.texts += texts
        chunk.num_characters += sum(map(len, texts))

    def _assemble(
        self,
        chunk: _Chunk,
        encoded: Sequence[Sequence[int] | np.ndarray],
        on_dropped: Callable[[Conversation, TooLongError | None], None],
    ) -> SampleStore:
        layout = _Layout()
        texts = iter(zip(chunk.texts, encoded, strict=True))
        for conversation, (pieces, appends_eos) in zip(chunk.conversations, chunk.pieces, strict=True):
            own = list(islice(texts, sum(not piece.special for piece in pieces)))
            if not has_response(conversation, only_last=self._only_last):
                on_dropped(conversation, None)
                continue
            parts = self._lay_out(conversation, pieces, [ids for _, ids in own], appends_eos)
            if parts is not None:
                layout.add(parts)
                continue
            self._remembering.known = {text: list(map(int, ids)) for text, ids in own}
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

    def _lay_out(
        self,
        conversation: Conversation,
        pieces: Sequence[Piece],
        encoded: Sequence[Sequence[int] | np.ndarray],
        appends_eos: bool,
    ) -> list[tuple[Sequence[int] | np.ndarray, bool]] | None:
        """The parts of a sample and whether they are learned; None where only `SampleBuilder` will do."""
        eos, prefix = self._encoder.eos_token_id, self._encoder.prefix_ids
        parts: list[tuple[Sequence[int] | np.ndarray, bool]] = [(prefix, False)]
        texts = iter(encoded)
        last = len(pieces) - 1
        end = last_run = 0
        was_learned = False
        for position, piece in enumerate(pieces):
            if not piece.special:
                ids = next(texts)
            elif piece.data:
                return None
            else:
                ids = self._pieces.special_ids(piece)
            if not len(ids):
                return None
            learned = piece.learned
            if learned and not was_learned:
                last_run = len(parts)
            was_learned = learned
            parts.append((ids, learned))
            if learned:
                if appends_eos and ids[-1] != eos and (position == last or not pieces[position + 1].learned):
                    parts.append(((eos,), True))
                end = len(parts)
        del parts[end:]
        if not self._may_stay(conversation, parts):
            return None
        if self._only_last:
            parts[:last_run] = [(ids, False) for ids, _ in parts[:last_run]]
        return parts

    def _may_stay(
        self, conversation: Conversation, parts: Sequence[tuple[Sequence[int] | np.ndarray, bool]]
    ) -> bool:
        """Whether the rules of `SampleBuilder` leave these parts as they are, the prefix before them."""
        if len(parts) < 2:
            return False
        prefix = self._encoder.prefix_ids
        if prefix and parts[1][0][0] == prefix[0]:  # the template may have written it already
            return False
        num_tokens = num_source_tokens = 0
        in_source = True
        for ids, learned in parts:
            in_source = in_source and not learned
            num_tokens += len(ids)
            num_source_tokens += len(ids) if in_source else 0
        # Running text has no token before its first, so that one is not learned; it needs another.
        if num_tokens - max(num_source_tokens, 1) < 2 or num_tokens > self._max_length:
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
        self._ids: list[Sequence[int] | np.ndarray] = []
        self._learned: list[bool] = []
        self._num_parts: list[int] = []
        self._cuts: list[int] = []
        self._dropped_rounds: list[int] = []

    def add(
        self,
        parts: Sequence[tuple[Sequence[int] | np.ndarray, bool]],
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
        learned = sample.labels != IGNORE_INDEX
        # The last token is not an input; where it is not learned either, any will do.
        tokens = np.append(sample.input_ids, sample.labels[-1] if learned[-1] else 0)
        borders = [0, *(np.flatnonzero(np.diff(learned)) + 2).tolist(), len(tokens)]
        if learned[0]:
            borders.insert(1, 1)
        parts = [
            (tokens[start:stop], bool(start and learned[start - 1]))
            for start, stop in zip(borders[:-1], borders[1:], strict=True)
        ]
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


def _flatten(parts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """int32, all ids in a row."""
    if not parts:
        return np.zeros(0, np.int32)
    return np.concatenate([np.asarray(ids, dtype=np.int32) for ids in parts])
