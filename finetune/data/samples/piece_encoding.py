"""From the pieces of a template to token ids, with a flag for each piece that says whether it is learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.data.reading.conversation import Message
from finetune.data.samples.parts import Part, as_ids, drop_first, join_ids, take_first
from finetune.data.templates.pieces import Piece, PieceWriter, RefusedConversationError, Template
from finetune.errors import UserError


class PlainText(NamedTuple):
    """A text without special tokens.

    Attributes:
        text: The text.
        inner: Whether it follows something, where the tokenizer spells that otherwise than a beginning.
    """

    text: str
    inner: bool = False


KnownIds = dict[PlainText | Piece, NDArray[Any]]
"""The ids, int32 [N], of texts, and of pieces in which a template's text and an example's are mixed."""


class TextEncoder(Protocol):
    """What a tokenizer has to offer here.

    Attributes:
        eos_token_id: Closes a response.
        pad_token_id: Fills up a row of a batch.
        prefix_ids: The ids that frame a prompt, such as ``(bos,)``; may be empty.
        answer_prefix_ids: The ids between a prompt and its answer; mostly empty.
    """

    eos_token_id: int
    pad_token_id: int
    prefix_ids: tuple[int, ...]
    answer_prefix_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """The ids of a text: no special token added, and none recognised, since text is data."""
        ...

    def encode_special(self, text: str) -> list[int]:
        """The same, but names of special tokens in the text give these tokens (asked of templates only)."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        ...


def opens_answers(encoder: TextEncoder) -> bool:
    """Whether ids stand between a prompt and its answer, so that a sample has one answer only."""
    return bool(getattr(encoder, "answer_prefix_ids", ()))


class PieceEncoder:
    """Encodes pieces; remembers the ids of special tokens.

    Args:
        encoder: The tokenizer; one with a method `encode_many` (texts to the ids of each, the same as from
            `encode`) is used so where there are many texts.
        template: Writes the pieces.

    Raises:
        UserError: The template writes special tokens that the tokenizer does not have.
    """

    def __init__(self, encoder: TextEncoder, template: Template):
        self._encoder = encoder
        self._prefix_ids = tuple(encoder.prefix_ids)
        self._special_ids: dict[str, NDArray[Any]] = {}
        self._end: Part = as_ids([encoder.eos_token_id]), True
        self._marks = tuple(template.special_tokens)
        missing = [mark for mark in self._marks if len(encoder.encode_special(mark)) != 1]
        if missing:
            raise UserError(
                f"chat_template {getattr(template, 'name', '')} writes the special tokens {', '.join(missing)}, "
                "which this model's tokenizer does not have: choose the template the model was made for, "
                "or one of plain, alpaca, chatglm2, vicuna, which need none."
            )
        self._tears = getattr(encoder, "splits_special", True)
        self._mark_ids = {encoder.encode_special(mark)[0] for mark in self._marks} if self._tears else set()
        self._marks_inner = bool(getattr(encoder, "marks_inner_text", False))
        self._blanks_beside = getattr(encoder, "blanks_beside", None)
        self._is_token: dict[str, bool] = {}
        self._writes_blanks = encoder.encode("a b") == encoder.encode("a") + encoder.encode("b")

    def settle(self, pieces: list[Piece], *, is_mixed: bool = False) -> list[Piece]:
        """Pieces in which names that are no tokens of this tokenizer are text like the text beside them.

        A template's text is cut at what looks like a token; where it is none, cutting would change the ids.
        """
        if is_mixed or all(self._stands(piece) for piece in pieces):
            return pieces
        writer = PieceWriter()
        for piece in pieces:
            kind = "special" if piece.special and self._stands(piece) else "data"
            if kind == "data" and (piece.special or piece.joined):
                kind = "text"
            writer.write(kind, piece.text, learned=piece.learned)
        return writer.finish()

    def _stands(self, piece: Piece) -> bool:
        """Whether a piece may stay as it is."""
        if not piece.special:
            return True
        if piece.text not in self._is_token:
            self._is_token[piece.text] = len(self._encoder.encode_special(piece.text)) == 1
        return self._is_token[piece.text]

    def encode(
        self,
        pieces: Sequence[Piece],
        known: KnownIds,
        *,
        appends_eos: bool,
        only_last: bool = False,
        answers: Sequence[Message] = (),
    ) -> list[Part]:
        """The parts of a conversation, none of them empty; without the prefix, but EOS after each answer.

        Args:
            pieces: A conversation.
            known: Ids found before; what is encoded here is added.
            appends_eos: Whether EOS closes each learned run.
            only_last: Only the last learned run stays learned.
            answers: The answers of the conversation, where some of them are not to be learned.

        Raises:
            RefusedConversationError: The template writes the answers in such a way that they cannot be told apart.
        """
        parts: list[Part] = []
        runs: list[int] = []  # where each learned run begins
        eos = self._encoder.eos_token_id
        was_learned = False
        for position, piece in enumerate(pieces):
            if piece.learned and not was_learned:
                runs.append(len(parts))
            was_learned = piece.learned
            ids = self._find_ids(piece, known)
            if len(ids):
                parts.append((ids, piece.learned))
            ends_run = piece.learned and (position + 1 == len(pieces) or not pieces[position + 1].learned)
            if ends_run and appends_eos and not (len(ids) and ids[-1] == eos):
                parts.append(self._end)
        if only_last and runs:
            parts[: runs[-1]] = [(ids, False) for ids, _ in parts[: runs[-1]]]
        if answers:
            _unlearn(parts, runs, answers)
        return self._without_prefix(parts)

    def encode_texts(self, texts: Iterable[PlainText]) -> KnownIds:
        """The ids of many texts, for `encode`; another thread can do something else meanwhile."""
        plain = list(texts)
        encoded: KnownIds = {}
        for inner in (False, True) if self._marks_inner else (False,):
            some = [text for text in plain if text.inner == inner]
            encoded |= zip(some, self._encode_many([text.text for text in some], inner=inner), strict=True)
        # One look at all ids, since hardly any text names a special token.
        if self._mark_ids and self._has_marks(join_ids([encoded[text] for text in plain])):
            encoded = {text: self._encode_as_plain_text(text, encoded[text]) for text in plain}
        return encoded

    def plain_text(self, piece: Piece) -> PlainText:
        """What goes to the tokenizer of a piece without special tokens."""
        text = piece.text
        if self._blanks_beside is not None:
            if piece.after and self._blanks_beside(piece.after)[1]:
                text = text.lstrip()
            if piece.before and self._blanks_beside(piece.before)[0]:
                text = text.rstrip()
        if self._marks_inner:
            return PlainText(text, bool(piece.after) or piece.joined)
        return PlainText(text[1:] if piece.joined and self._writes_blanks else text)

    def _encode_many(self, texts: list[str], *, inner: bool) -> Iterable[NDArray[Any]]:
        encode_many = getattr(self._encoder, "encode_many", None)
        if encode_many is None:
            return [as_ids(self._encode_one(PlainText(text, inner))) for text in texts]
        return map(as_ids, encode_many(texts, inner=True) if inner else encode_many(texts))

    def _encode_one(self, text: PlainText) -> list[int]:
        if text.inner:
            return self._encoder.encode(text.text, inner=True)  # type: ignore[call-arg]
        return self._encoder.encode(text.text)

    def _without_prefix(self, parts: list[Part]) -> list[Part]:
        """The parts without the ids that frame a prompt, where the template has written them already."""
        prefix = self._prefix_ids
        if not prefix or not parts or parts[0][0][0] != prefix[0]:
            return parts
        head = take_first(parts, len(prefix))
        is_prefix = tuple(join_ids([ids for ids, _ in head]).tolist()) == prefix
        if is_prefix and not any(learned for _, learned in head):
            return drop_first(parts, len(prefix))
        return parts

    def _find_ids(self, piece: Piece, known: KnownIds) -> NDArray[Any]:
        if piece.special and not piece.data:
            if piece.text not in self._special_ids:
                self._special_ids[piece.text] = as_ids(self._encoder.encode_special(piece.text))
            return self._special_ids[piece.text]
        key = piece if piece.special else self.plain_text(piece)
        if key not in known:
            known[key] = self._encode_mixed(key) if isinstance(key, Piece) else self._encode_text(key)
        return known[key]

    def _encode_text(self, text: PlainText) -> NDArray[Any]:
        return self._encode_as_plain_text(text, as_ids(self._encode_one(text)))

    def _encode_as_plain_text(self, text: PlainText, ids: NDArray[Any]) -> NDArray[Any]:
        """Ids of a text in which the template's special tokens are not recognised.

        Some tokenizers know the marks of a template as added tokens and recognise them in any text; there
        the name is torn apart.
        """
        if self._has_marks(ids):
            for mark in self._marks:
                if (start := text.text.find(mark)) >= 0:
                    first = PlainText(text.text[: start + 1], text.inner)
                    rest = PlainText(text.text[start + 1 :], self._marks_inner)
                    return join_ids([*map(self._encode_text, (first, rest))])
        return ids

    def _has_marks(self, ids: NDArray[Any]) -> bool:
        return any(bool(np.any(ids == mark)) for mark in self._mark_ids)

    def _encode_mixed(self, piece: Piece) -> NDArray[Any]:
        """Ids of a piece in which the template's text and an example's are mixed."""
        encode_special = self._encoder.encode_special
        data = piece.data.strip()  # templates often trim it
        literal = self._encoder.encode(data)
        if literal == encode_special(data):
            return as_ids(encode_special(piece.text))  # in one go: some tokenizers mark the start of a text
        before, found, after = piece.text.partition(data)
        if not found:  # the template has altered the data
            return as_ids(self._encoder.encode(piece.text))
        return as_ids(encode_special(before) + literal + encode_special(after))


def _unlearn(parts: list[Part], runs: Sequence[int], answers: Sequence[Message]) -> None:
    """Takes the labels from the runs of answers that are not to be learned.

    Each answer is one run; an answer without any text of its own or of the template has none.
    """
    stops = [*runs[1:], len(parts)]
    written = [
        answers,
        [each for each in answers if each.content],
        [each for each in answers if each.content.strip()],
    ]
    matching = next((each for each in written if len(each) == len(runs)), None)
    if matching is None:
        raise RefusedConversationError(
            f"the template writes {len(runs)} learned stretches for {len(answers)} answers, so that the marks "
            "on single answers cannot be obeyed: choose another chat_template, or take the marks out"
        )
    for message, start, stop in zip(matching, runs, stops, strict=True):
        if not message.learned:
            parts[start:stop] = [(ids, False) for ids, _ in parts[start:stop]]
