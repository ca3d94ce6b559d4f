"""From the pieces of a template to token ids, each with a flag that says whether it is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from finetune.data.pieces import Piece, Template
from finetune.errors import UserError


class TextEncoder(Protocol):
    """What a tokenizer has to offer here.

    Attributes:
        eos_token_id: Closes a response.
        pad_token_id: Fills up a row of a batch.
        prefix_ids: The ids that frame a prompt, such as ``(bos,)``; may be empty.
    """

    eos_token_id: int
    pad_token_id: int
    prefix_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """The ids of a text: no special token added, and none recognised, since text is data."""
        ...

    def encode_special(self, text: str) -> list[int]:
        """The same, but names of special tokens in the text give these tokens (asked of templates only)."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        ...


class PieceEncoder:
    """Encodes pieces one by one; remembers the ids of special tokens.

    Args:
        encoder: The tokenizer.
        template: Writes the pieces.

    Attributes:
        mark_ids: Ids of the template's special tokens.

    Raises:
        UserError: The template writes special tokens that the tokenizer does not have.
    """

    def __init__(self, encoder: TextEncoder, template: Template):
        self._encoder = encoder
        self._appends_eos = template.appends_eos
        self._prefix_ids = tuple(encoder.prefix_ids)
        self._special_ids: dict[str, list[int]] = {}
        self._marks = tuple(template.special_tokens)
        missing = [mark for mark in self._marks if len(encoder.encode_special(mark)) != 1]
        if missing:
            raise UserError(
                f"chat_template {getattr(template, 'name', '')} writes the special tokens {', '.join(missing)}, "
                "which this model's tokenizer does not have: choose the template the model was made for, "
                "or one of plain, alpaca, chatglm2, vicuna, which need none."
            )
        self.mark_ids = {encoder.encode_special(mark)[0] for mark in self._marks}
        self._writes_blanks = encoder.encode("a b") == encoder.encode("a") + encoder.encode("b")

    def encode(
        self,
        pieces: Sequence[Piece],
        *,
        appends_eos: bool | None = None,
        only_last: bool = False,
        memory: dict[Piece, list[int]] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """The ids of the pieces and whether each is learned; no prefix, but EOS after each answer.

        Args:
            pieces: A conversation.
            appends_eos: Whether EOS closes each learned run; None: as the template says.
            only_last: Only the last learned run stays learned.
            memory: Keeps the ids of pieces from one rendering of a conversation to the next.
        """
        if appends_eos is None:
            appends_eos = self._appends_eos
        ids: list[int] = []
        learned: list[bool] = []
        last_run_start = 0
        was_learned = False
        for position, piece in enumerate(pieces):
            if piece.learned and not was_learned:
                last_run_start = len(ids)
            was_learned = piece.learned
            piece_ids = memory.get(piece) if memory is not None else None
            if piece_ids is None:
                piece_ids = self._encode_piece(piece)
                if memory is not None:
                    memory[piece] = piece_ids
            ids += piece_ids
            ends_run = piece.learned and (position + 1 == len(pieces) or not pieces[position + 1].learned)
            if ends_run and appends_eos and piece_ids[-1:] != [self._encoder.eos_token_id]:
                ids.append(self._encoder.eos_token_id)
            learned += [piece.learned] * (len(ids) - len(learned))
        if only_last:
            learned[:last_run_start] = [False] * last_run_start
        num_prefix = len(self._prefix_ids)
        if tuple(ids[:num_prefix]) == self._prefix_ids and True not in learned[:num_prefix]:
            return ids[num_prefix:], learned[num_prefix:]
        return ids, learned

    def _encode_piece(self, piece: Piece) -> list[int]:
        if not piece.special:
            return self._encode_text(self.plain_text(piece))
        if piece.data:
            return self._encode_mixed(piece)
        return self.special_ids(piece)

    def plain_text(self, piece: Piece) -> str:
        """What goes to the tokenizer of a piece without special tokens."""
        return piece.text[1:] if piece.joined and self._writes_blanks else piece.text

    def special_ids(self, piece: Piece) -> list[int]:
        """The ids of a piece of the template's own."""
        ids = self._special_ids.get(piece.text)
        if ids is None:
            ids = self._special_ids[piece.text] = self._encoder.encode_special(piece.text)
        return ids

    def _encode_text(self, text: str) -> list[int]:
        """Ids of text in which the template's special tokens are not recognised.

        Some tokenizers know the marks of a template as added tokens and recognise them in any text; there
        the name is torn apart.
        """
        ids = self._encoder.encode(text)
        if self.mark_ids.isdisjoint(ids):
            return ids
        for mark in self._marks:
            if (start := text.find(mark)) >= 0:
                return self._encode_text(text[: start + 1]) + self._encode_text(text[start + 1 :])
        return ids

    def _encode_mixed(self, piece: Piece) -> list[int]:
        """Ids of a piece in which the template's text and an example's are mixed."""
        encode_special: Callable[[str], list[int]] = self._encoder.encode_special
        data = piece.data.strip()  # templates often trim it
        literal = self._encoder.encode(data)
        if literal == encode_special(data):
            return encode_special(piece.text)  # in one go: some tokenizers mark the start of a text
        before, found, after = piece.text.partition(data)
        if not found:  # the template has altered the data
            return self._encoder.encode(piece.text)
        return encode_special(before) + literal + encode_special(after)
