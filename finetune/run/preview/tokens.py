"""One sample on the screen: its tokens side by side, each above its id, the learned ones marked.

::

    <s> ▁Name ▁one ▁fruit . [[▁A pple </s>]]
    1    4408  697  15774 29889  319 2280 2

Learned tokens are green on a terminal with colours, and stand in ``[[ ]]`` elsewhere. A long sample is
shown by its first rows, the rows where learning begins, and its last rows.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.data.samples.tokenize import IGNORE_INDEX, Prompt, Sample
from finetune.machine.language.translation import translate_piece

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

MAX_ROWS = 12
"""Samples of more rows are shown in part."""
_BLOCK_ROWS = 3
"""Rows of each part that is then shown."""
_INDENT = 2
_MAX_PIECE_WIDTH = 30
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_NAME = re.compile(r"<[^<>\s]+>|\[\w+\]")
_BROKEN = "\ufffd"
_PART = "<?>"
_MAX_PARTS = 12
_STYLES = {(False, False): "", (False, True): "bold cyan", (True, False): "green", (True, True): "bold green"}


@dataclass(frozen=True, kw_only=True)
class Example:
    """What is shown of a sample or a prompt.

    Attributes:
        ids: Its tokens.
        learned: Whether each of them is learned.
        notes: What was cut.
        target: The expected answer, for a prompt.
    """

    ids: list[int]
    learned: list[bool]
    notes: tuple[str, ...] = ()
    target: str = ""

    @classmethod
    def of_sample(cls, sample: Sample) -> Example:
        """Undoes the shift between tokens and labels."""
        learned = [False, *(sample.labels != IGNORE_INDEX).tolist()]
        ids = sample.input_ids.tolist()
        if learned[-1]:
            ids.append(int(sample.labels[-1]))
        notes = _describe_cuts(sample.truncated_source, sample.truncated_target, sample.num_dropped_rounds)
        return cls(ids=ids, learned=learned[: len(ids)], notes=notes)

    @classmethod
    def of_prompt(cls, prompt: Prompt) -> Example:
        """A prompt, of which nothing is learned."""
        ids = prompt.input_ids.tolist()
        notes = _describe_cuts(prompt.truncated_source, False, prompt.num_dropped_rounds)
        return cls(ids=ids, learned=[False] * len(ids), notes=notes, target=prompt.target)


def _describe_cuts(source: bool, target: bool, num_rounds: int) -> tuple[str, ...]:
    notes = ["source cut"] * source + ["target cut"] * target
    if num_rounds:
        notes.append(f"{num_rounds} old round{'s' if num_rounds > 1 else ''} left out")
    return tuple(notes)


class Token(NamedTuple):
    """A token as it is shown.

    Attributes:
        text: Its readable text; "▁" stands for a blank.
        special: Whether it is a special token and not text.
    """

    text: str
    special: bool


class TokenReader:
    """Makes pieces readable, those that are bytes of a character as well.

    The byte pieces of 你 are shown as ``<E4>``, ``<BD>``, ``<A0>你``: the last one completes it. Where the
    tokenizer does not tell the bytes of a part, it is ``<?>``.

    Args:
        encoder: A tokenizer with `pieces`.
    """

    def __init__(self, encoder: Any):
        self._encoder = encoder
        self._framing = {encoder.eos_token_id, encoder.pad_token_id, *encoder.prefix_ids}
        self._framing |= set(getattr(encoder, "answer_prefix_ids", ()))
        self._framing |= set(getattr(encoder, "chat_end_ids", ()))
        probe = encoder.pieces(encoder.encode("\n"))
        # In the alphabet of byte-level vocabularies a line's end is the letter Ċ.
        self._is_byte_level = any(isinstance(piece, str) and "Ċ" in piece for piece in probe)

    def read(self, ids: Sequence[int]) -> list[Token]:
        """The tokens of a sample."""
        tokens = []
        pending = bytearray()  # the bytes of a character that is not complete yet
        for index, piece in zip(ids, self._pieces(list(ids)), strict=True):
            special = self._is_special(index, piece)
            content = piece if special else self._content(piece)
            if isinstance(content, bytes):
                tokens.append(Token(_printable(_read_bytes(content, pending)), special))
            else:
                pending.clear()
                tokens.append(Token(_printable(content), special))
        return tokens

    def _pieces(self, ids: list[int]) -> list[str | bytes]:
        """Pieces of the tokens; of a character in several of them only the last knows the text.

        Byte-level tokenizers that give text for a piece give U+FFFD for a part of a character.
        """
        pieces = list(self._encoder.pieces(ids))
        start = 0
        while start < len(pieces):
            stop = self._end_of_parts(ids, pieces, start)
            if stop > start + 1:
                parts = [str(piece).replace(_BROKEN, "") for piece in pieces[start : stop - 1]]
                rest = self._encoder.decode(ids[start:stop])[sum(map(len, parts)) :]
                pieces[start:stop] = [*(part + _PART for part in parts), _PART + rest]
            start = stop
        return pieces

    def _end_of_parts(self, ids: list[int], pieces: list[str | bytes], start: int) -> int:
        """Behind the last of the pieces that only together are text; one piece when there is no such."""
        if _is_broken(pieces[start]):
            for stop in range(start + 2, min(start + _MAX_PARTS, len(ids)) + 1):
                if not _is_broken(self._encoder.decode(ids[start:stop])):
                    return stop
        return start + 1

    def _is_special(self, index: int, piece: str | bytes) -> bool:
        if index in self._framing:
            return True
        if isinstance(piece, bytes) or _BYTE.fullmatch(piece) or not _NAME.fullmatch(piece):
            return False
        return list(self._encoder.encode_special(piece)) == [index] != list(self._encoder.encode(piece))

    def _content(self, piece: str | bytes) -> str | bytes:
        if isinstance(piece, bytes):
            return piece
        if self._is_byte_level:
            alphabet = _byte_level_alphabet()
            known = all(char in alphabet for char in piece)
            return bytes(alphabet[char] for char in piece) if known else piece
        found = _BYTE.fullmatch(piece)
        return bytes([int(found.group(1), 16)]) if found else piece


def _is_broken(piece: str | bytes) -> bool:
    return isinstance(piece, str) and _BROKEN in piece


def _read_bytes(data: bytes, pending: bytearray) -> str:
    """Text of a token's bytes; `pending` holds what earlier tokens have begun, and is continued."""
    text = ""
    start = None if pending else 0  # where in `text` the current character begins, None: in an earlier token
    for byte in data:
        if not pending:
            start = len(text)
        pending.append(byte)
        text += f"<{byte:02X}>"
        try:
            char = pending.decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                pending.clear()
            continue
        text = (text if start is None else text[:start]) + char
        pending.clear()
    return text


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """Character of a byte-level vocabulary -> byte: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): b for place, b in enumerate(others)}


def _printable(text: str) -> str:
    text = text.replace(" ", "▁")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def uses_marks(console: Console) -> bool:
    """Whether what is learned stands in ``[[ ]]``, for want of colours."""
    return console.no_color or not console.color_system


def print_example(console: Console, title: str, example: Example, reader: TokenReader) -> None:
    """Prints one sample.

    Args:
        console: Where to; colours are used when it has them.
        title: Its name.
        example: The sample.
        reader: Makes its ids readable.
    """
    from rich.text import Text

    figures = f"{len(example.ids):,} tokens"
    if any(example.learned):
        figures += f", {sum(example.learned):,} learned"
    console.print()
    notes = map(translate_piece, (figures, *example.notes))
    console.print(Text.assemble((translate_piece(title), "bold"), "  ", "; ".join(notes)))
    for line in _lines(example, reader.read(example.ids), console.width, marks=uses_marks(console)):
        console.print(line, soft_wrap=True)
    if example.target:
        target = Text(f"  {translate_piece('expected:')} ", "dim")
        target.append(_printable(example.target.strip()).replace("▁", " "))
        target.truncate(2 * console.width, overflow="ellipsis")
        console.print(target)


class _Cell(NamedTuple):
    text: str
    number: str
    style: str
    offset: int  # of the id, in columns
    width: int


def _lines(example: Example, tokens: list[Token], width: int, *, marks: bool) -> Iterator[Text]:
    """The rows that are shown, two lines each, and what stands for the others."""
    from rich.text import Text

    cells = [_make_cell(example, tokens, place, marks=marks) for place in range(len(tokens))]
    rows = _break_rows(cells, width - _INDENT)
    end = 0
    for row in _choose_rows(rows, example.learned):
        if row.start > end:
            yield Text(" " * _INDENT + _describe_gap(example.learned, end, row.start, marks=marks), "yellow")
        yield _join(cells[row.start : row.stop], ids=False)
        yield _join(cells[row.start : row.stop], ids=True)
        end = row.stop


def _make_cell(example: Example, tokens: list[Token], place: int, *, marks: bool) -> _Cell:
    from rich.cells import cell_len, chop_cells

    token, learned = tokens[place], example.learned
    text, number = token.text, str(example.ids[place])
    if cell_len(text) > _MAX_PIECE_WIDTH:
        text = chop_cells(text, _MAX_PIECE_WIDTH - 1)[0] + "…"
    opens = marks and learned[place] and (place == 0 or not learned[place - 1])
    closes = marks and learned[place] and (place + 1 == len(learned) or not learned[place + 1])
    text = "[[" * opens + text + "]]" * closes
    offset = 2 if opens else 0
    width = max(cell_len(text), offset + len(number))
    return _Cell(text, number, _STYLES[learned[place], token.special], offset, width)


def _break_rows(cells: list[_Cell], width: int) -> list[range]:
    rows, start, used = [], 0, 0
    for place, cell in enumerate(cells):
        if used and used + 1 + cell.width > width:
            rows.append(range(start, place))
            start, used = place, 0
        used += cell.width + (1 if used else 0)
    return [*rows, range(start, len(cells))]


def _choose_rows(rows: list[range], learned: list[bool]) -> list[range]:
    """All rows, or the first ones, those around the first learned token, and the last ones."""
    if len(rows) <= MAX_ROWS:
        return rows
    last = len(rows) - _BLOCK_ROWS
    first_learned = learned.index(True) if True in learned else 0
    middle = next(number for number, row in enumerate(rows) if first_learned < row.stop)
    kept = {*range(_BLOCK_ROWS), *range(last, len(rows))}
    kept |= set(range(max(middle - _BLOCK_ROWS // 2, 0), middle + _BLOCK_ROWS // 2 + 1))
    return [row for number, row in enumerate(rows) if number in kept]


def _describe_gap(learned: list[bool], start: int, stop: int, *, marks: bool) -> str:
    """What is left out; closes the mark before it and opens it again behind it."""
    number, num_learned = stop - start, sum(learned[start:stop])
    share = {0: "none of them learned", number: "all of them learned"}.get(
        num_learned, f"{num_learned:,} learned"
    )
    text = f"… {number:,} more tokens, {share} …"
    closes = "]] " * (marks and learned[start - 1] and learned[start])
    opens = " [[" * (marks and learned[stop - 1] and learned[stop])
    return closes + text + opens


def _join(cells: list[_Cell], *, ids: bool) -> Text:
    from rich.cells import cell_len
    from rich.text import Text

    line = Text(" " * _INDENT)
    for cell in cells:
        content = " " * cell.offset + cell.number if ids else cell.text
        line.append(content, "dim" if ids else cell.style)
        line.append(" " * (cell.width - cell_len(content) + 1))
    line.rstrip()
    return line
