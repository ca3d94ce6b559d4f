"""Many conversations to samples at once, at the speed of the tokenizer.

What costs time beside the tokenizer is Python's handling of single tokens. So the texts of some hundred
conversations go to the tokenizer together, which spreads them over threads while the next texts are being
rendered here. What comes back is cut to length by `SampleBuilder` and laid end to end in flat arrays, as parts,
whose tokens nothing here looks at one by one::

    conversation 7            | conversation 8
    prefix  source  target eos| prefix  source  target eos       parts, in order
      1       23      140   1 |   1       310     75    1        their lengths
      no      no      yes  yes|   no      no      yes  yes       learned
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from finetune.data.reading.conversation import Conversation
from finetune.data.samples.cutting import CutSample
from finetune.data.samples.piece_encoding import KnownIds, PlainText, TextEncoder, opens_answers
from finetune.data.samples.sample_store import SampleStore
from finetune.data.samples.tokenize import SampleBuilder, TooLongError
from finetune.data.templates.pieces import (
    Piece,
    RefusedConversationError,
    RewrittenConversationError,
    Template,
)

CHUNK_CHARACTERS = 500_000
"""Text that goes to the tokenizer together: enough to keep its threads busy."""

NUM_CHUNKS_AHEAD = 3
"""Chunks rendered before their ids are needed, so that the tokenizer never waits."""

ALL = "all"
EACH = "each"
"""`train_on`: every answer is the last one of a sample of its own."""

DropCause = TooLongError | RefusedConversationError | None
"""Why a conversation gives no sample; None: nothing of it is left to learn."""

_Rendered = tuple[Conversation, list[Piece], SampleBuilder]
"""What becomes samples, its pieces, and who cuts them."""

OnDropped = Callable[[Conversation, DropCause], None]
OnMade = Callable[[Conversation, int, TooLongError | None], None]


class BulkBuilder(SampleBuilder):
    """A `SampleBuilder` for many conversations.

    Args:
        encoder: The tokenizer.
        template: Gives the pieces.
        train_on: "all" or "last" of the answers; with "each" every answer becomes the last one of a sample of its
            own, behind exactly what a model is given when it is asked for that answer. With "all" that happens to
            conversations whose earlier messages the template writes anew when later ones follow, and to all for a
            tokenizer with ids between a prompt and its answer, of which a sample has one only.
        **options: As for `SampleBuilder`.
    """

    def __init__(self, encoder: TextEncoder, template: Template, *, train_on: str = "all", **options: Any):
        divides = train_on == EACH or (train_on == ALL and opens_answers(encoder))
        super().__init__(encoder, template, train_on="last" if divides else train_on, **options)
        self._divides = divides
        can_divide = train_on == ALL and not divides
        self._divider = BulkBuilder(encoder, template, train_on=EACH, **options) if can_divide else None

    def build(
        self,
        conversations: Iterable[Conversation],
        on_dropped: OnDropped,
        on_made: OnMade = lambda conversation, count, too_long: None,
    ) -> SampleStore:
        """Encodes conversations.

        Args:
            conversations: In the order of the samples.
            on_dropped: Told of each that gives no sample, and why.
            on_made: Told of each that gives samples, how many, and what of it is too long.
        """
        chunks = self._encode(self._chunks(iter(conversations)))
        return SampleStore.join(
            SampleStore.from_cut(list(self._cut_chunk(chunk, known, on_dropped, on_made)))
            for chunk, known in chunks
        )

    def _chunks(self, conversations: Iterator[Conversation]) -> Iterator[_Chunk]:
        """Renders conversations, and notes which texts the tokenizer has to encode."""
        chunk = _Chunk()
        while batch := list(islice(conversations, 16)):
            for conversation in batch:
                try:
                    rendered = self._render_parts(conversation)
                except RefusedConversationError as error:
                    chunk.rendered.append((conversation, error))
                    continue
                chunk.rendered.append((conversation, rendered))
                for piece in (piece for _, pieces, _ in rendered for piece in pieces):
                    if not piece.special:
                        text = self._pieces.plain_text(piece)
                        chunk.texts[text] = None
                        chunk.num_characters += len(text.text)
            if chunk.num_characters >= CHUNK_CHARACTERS:
                yield chunk
                chunk = _Chunk()
        if chunk.rendered:
            yield chunk

    def _render_parts(self, conversation: Conversation) -> list[_Rendered]:
        """The pieces of all that becomes samples."""
        try:
            return [(part, self.render(part), self) for part in self._parts_of(conversation)]
        except RewrittenConversationError:
            if self._divider is None:
                raise
            return self._divider._render_parts(conversation)

    def _parts_of(self, conversation: Conversation) -> list[Conversation]:
        """What becomes samples: the conversation, or it up to each answer that is learned."""
        if not self._divides or conversation.is_text:
            return [conversation]
        return conversation.up_to_each_answer() or [conversation]

    def _encode(self, chunks: Iterator[_Chunk]) -> Iterator[tuple[_Chunk, KnownIds]]:
        """The ids of the texts of each chunk, some chunks ahead of what is asked for."""
        with ThreadPoolExecutor(1) as pool:
            waiting: deque[tuple[_Chunk, Future[KnownIds]]] = deque()
            for chunk in chunks:
                waiting.append((chunk, pool.submit(self._pieces.encode_texts, chunk.texts)))
                if len(waiting) > NUM_CHUNKS_AHEAD:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()

    def _cut_chunk(
        self, chunk: _Chunk, known: KnownIds, on_dropped: OnDropped, on_made: OnMade
    ) -> Iterator[CutSample]:
        for conversation, rendered in chunk.rendered:
            cause: DropCause = None
            too_long: TooLongError | None = None
            samples: list[CutSample] = []
            if isinstance(rendered, RefusedConversationError):
                cause = rendered
            else:
                try:
                    for part, pieces, builder in rendered:
                        samples += builder.cut(part, pieces, known)
                except TooLongError as error:  # what stands before an answer that is too long may fit
                    cause = too_long = error
                except RefusedConversationError as error:
                    cause = error
            if samples:
                on_made(conversation, len(samples), too_long)
                yield from samples
            else:
                on_dropped(conversation, cause)


class _Chunk:
    """Conversations that go to the tokenizer together, rendered, and their texts without doubles."""

    def __init__(self) -> None:
        self.rendered: list[tuple[Conversation, list[_Rendered] | RefusedConversationError]] = []
        self.texts: dict[PlainText, None] = {}
        self.num_characters = 0
