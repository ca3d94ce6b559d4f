"""Text to ids and back with tokens that have names: what every tokenizer of the project offers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.families.family import TokenizerFacts
from finetune.families.text_backends import Ids, TextBackend, UnsupportedTokenizerError
from finetune.tokenizers.added_tokens import AddedToken
from finetune.tokenizers.token_splitter import BLANK_SIGN, PREFIXES, Stretch, TokenSplitter

_BOS = "bos"
_HALF = re.compile("[\ud800-\udfff]")
_GENERAL_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class NamedIds:
    """The ids that a tokenizer gives to roles; one source for data, training, generation and export.

    Attributes:
        eos: Ends an answer.
        pad: Fills rows.
        prefix: Open every sequence.
        chat_ends: At these generation stops as well.
        answer_prefix: Between a prompt and its answer.
    """

    eos: int
    pad: int
    prefix: tuple[int, ...] = ()
    chat_ends: tuple[int, ...] = ()
    answer_prefix: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How text between tokens is treated.

    Attributes:
        composes: Whether it is brought into Unicode's composed form (NFC) first.
        marks_blanks: Whether blanks become SentencePiece's sign for them before names are looked for.
        prefixed: Whether every stretch between tokens gets a blank in front.
        first_only: Whether only the first stretch of a text does.
        even_blanks: Whether it does although it begins with a blank.
        unprefixed: Whether none does although the vocabulary would put one there.
        typed_prefix: Whether every stretch gets a typed blank in front unless it begins with one.
        reads_signs: Whether the sign for a blank in the name of a token is a blank in decoded text.
        splits_special: Whether names of special tokens in data are plain text.
    """

    composes: bool = False
    marks_blanks: bool = False
    prefixed: bool = False
    first_only: bool = False
    even_blanks: bool = False
    unprefixed: bool = False
    typed_prefix: bool = False
    reads_signs: bool = False
    splits_special: bool = True


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """Tokens by name.

    Attributes:
        tokens: The tokens.
        ids: Their ids.
        num_tokens: How many embeddings they and the vocabulary need.
    """

    tokens: Mapping[str, AddedToken]
    ids: Mapping[str, int]
    num_tokens: int


def named_ids(
    facts: TokenizerFacts,
    roles: Mapping[str, str],
    ids: Mapping[str, int],
    id_of: Callable[[str], int | None],
    *,
    config: Mapping[str, Any],
) -> NamedIds:
    """The ids of roles and of the texts that a family's record names.

    Args:
        facts: What the record says.
        roles: Names by role.
        ids: Ids by name.
        id_of: Looks other names up in the vocabulary.
        config: tokenizer_config.json.

    Raises:
        UnsupportedTokenizerError: A token is not there.
    """

    def find(name: str) -> int | None:
        content = roles.get(f"{name}_token", name)
        index = ids.get(content)
        return index if index is not None else id_of(content)

    def need(name: str) -> int:
        index = find(name)
        if index is None:
            raise UnsupportedTokenizerError(f"the tokenizer has no token {name}")
        return index

    pad = need("pad") if "pad_token" in roles else find(facts.pad_fallback)
    eos = need(facts.end_of_answer)
    ends = [index for name in facts.chat_ends if (index := find(name)) not in (None, eos)]
    pad, opening = eos if pad is None else pad, tuple(map(need, _opening(facts, config)))
    return NamedIds(eos, pad, opening, tuple(ends), tuple(map(need, facts.answer_prefix)))


def _opening(facts: TokenizerFacts, config: Mapping[str, Any]) -> tuple[str, ...]:
    """What opens a text, by role or name: with or without the beginning-of-sequence token, as the folder says.

    transformers' classes of these families read `add_bos_token`; its class for any tokenizer.json does not.
    """
    adds = config.get("add_bos_token")
    if (
        not facts.reads_add_bos
        or not isinstance(adds, bool)
        or config.get("tokenizer_class") in _GENERAL_CLASSES
    ):
        return facts.prefix
    others = tuple(name for name in facts.prefix if name != _BOS)
    return (_BOS, *others) if adds else others


class TokenEncoder:
    """Text to ids and back.

    Text is data: in it the names of added tokens such as ``<think>`` stand for them, as in transformers, but
    those of special tokens do not, so that no sample can close its own answer or open a new turn: they are
    spelled, as transformers does with `split_special_tokens`. With `Spelling.splits_special` false they stand
    for their tokens in data as well, which is what PaddleNLP and transformers do by default.

    Args:
        backend: Spells plain text.
        table: Tokens with names.
        named: The ids of roles.
        spelling: How text between tokens is treated.

    Attributes:
        eos_token_id: Id that ends an answer.
        pad_token_id: Id that fills rows.
        prefix_ids: Ids that open every sequence.
        chat_end_ids: Further ids at which generation stops.
        answer_prefix_ids: Ids between a prompt and its answer.
    """

    def __init__(self, backend: TextBackend, table: TokenTable, named: NamedIds, spelling: Spelling):
        self._backend, self._table, self._spelling = backend, table, spelling
        self.named = named
        special = [token for token in table.tokens.values() if token.special]
        ordinary = [token for token in table.tokens.values() if not token.special]
        self._all = self._splitter([*special, *ordinary])
        self._in_data = self._splitter(ordinary) if spelling.splits_special else self._all
        self._special = self._splitter(special)
        self._skips_blanks = spelling.first_only and not spelling.even_blanks
        self.splits_special = spelling.splits_special
        self.num_tokens = table.num_tokens
        self._special_ids = frozenset(table.ids[token.content] for token in special)
        self._names = {index: name for name, index in table.ids.items()}

    @property
    def named(self) -> NamedIds:
        """The ids of roles."""
        return self._named

    @named.setter
    def named(self, named: NamedIds) -> None:
        self._named = named
        self.eos_token_id, self.pad_token_id = named.eos, named.pad
        self.prefix_ids, self.chat_end_ids = named.prefix, named.chat_ends
        self.answer_prefix_ids = named.answer_prefix
        self._framing = frozenset(
            (named.eos, named.pad, *named.prefix, *named.chat_ends, *named.answer_prefix)
        )

    @property
    def marks_inner_text(self) -> bool:
        """Whether text that follows a token is spelled otherwise than text that begins."""
        return self._spelling.first_only

    def encode(self, text: str, *, inner: bool = False) -> list[int]:
        """Ids of a text; no special token is added.

        Args:
            text: Data.
            inner: Whether it follows a token.
        """
        return list(map(int, self.encode_many([text], inner=inner)[0])) if text else []

    def encode_many(self, texts: Sequence[str], *, inner: bool = False) -> Sequence[Ids]:
        """Ids of each text (lists, or int32 arrays), on several threads; the interpreter is free meanwhile.

        Raises:
            UserError: A text holds half of a character.
        """
        try:
            return self._encode(texts, self._in_data, inner=inner)
        except (TypeError, UnicodeEncodeError):
            _refuse_halves(texts)
            raise

    def encode_special(self, text: str, *, inner: bool = False) -> list[int]:
        """Ids of a template's own text, in which the names of special tokens stand for them."""
        try:
            return list(map(int, self._encode([text], self._all, inner=inner)[0])) if text else []
        except (TypeError, UnicodeEncodeError):
            _refuse_halves([text])
            raise

    def names_special(self, text: str) -> bool:
        """Whether a text spells the name of a special token."""
        return self._special.may_split(text)

    def blanks_beside(self, name: str) -> tuple[bool, bool]:
        """Whether the blanks on the left and on the right of a token belong to it."""
        token = self._table.tokens.get(name)
        return (token.lstrip, token.rstrip) if token else (False, False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without the special tokens; blanks are left as the ids have them.

        A model may have more embeddings than the tokenizer has tokens: their ids are no text.
        """
        skipped = self._special_ids | self._framing
        texts: list[str] = []
        run: list[int] = []
        for index in map(int, ids):
            if index in skipped:
                continue
            name = self._names.get(index)
            if name is None:
                run += [index] if index < self._backend.num_pieces else []
                continue
            texts += [self._decode_run(run, inner=bool(texts)), self._read_name(name)]
            run = []
        return "".join(texts) + self._decode_run(run, inner=bool(texts))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token for people to read; tokens with names by these."""
        return [self._piece(int(index)) for index in ids]

    def _piece(self, index: int) -> str:
        is_known = index in self._names or index < self._backend.num_pieces
        return (self._names.get(index) or self._backend.piece(index)) if is_known else f"<{index}>"

    def _decode_run(self, ids: list[int], *, inner: bool) -> str:
        spelling = self._spelling
        inner = (inner and spelling.first_only) or spelling.unprefixed
        return self._backend.decode(ids, inner=inner) if ids else ""

    def _read_name(self, name: str) -> str:
        return name.replace(BLANK_SIGN, " ") if self._spelling.reads_signs else name

    def _splitter(self, tokens: Iterable[AddedToken]) -> TokenSplitter:
        spelling = self._spelling
        return TokenSplitter(
            tokens,
            self._table.ids,
            normalize=_compose if spelling.composes else None,
            marks_blanks=spelling.marks_blanks,
            prefixed=spelling.prefixed,
            first_only=spelling.first_only,
            even_blanks=spelling.even_blanks,
        )

    def _encode(self, texts: Sequence[str], splitter: TokenSplitter, *, inner: bool) -> Sequence[Ids]:
        inner = inner and self._spelling.first_only
        split = {
            number: list(splitter.split(text, inner=inner))
            for number, text in enumerate(texts)
            if splitter.may_split(text) or (self._skips_blanks and text.startswith(PREFIXES))
        }
        if not split:
            return self._spell(texts, inner=inner)
        stretches = [split.get(number) or [Stretch(text, inner=inner)] for number, text in enumerate(texts)]
        spelled: dict[bool, Iterable[Ids]] = {}
        for is_inner in (False, True):
            plain = [s.text for s in chain.from_iterable(stretches) if s.token < 0 and s.inner == is_inner]
            spelled[is_inner] = iter(self._spell(plain, inner=is_inner)) if plain else iter(())
        return [
            _join([[s.token] if s.token >= 0 else next(iter(spelled[s.inner])) for s in parts])
            for parts in stretches
        ]

    def _spell(self, texts: Sequence[str], *, inner: bool) -> Sequence[Ids]:
        if self._spelling.composes:
            texts = [_compose(text) for text in texts]
        if self._spelling.typed_prefix:
            texts = [text if text.startswith(" ") or not text else f" {text}" for text in texts]
        return self._backend.encode_many(texts, inner=inner or self._spelling.unprefixed)


def _refuse_halves(texts: Iterable[str]) -> None:
    for text in texts:
        if isinstance(text, str) and (half := _HALF.search(text)):
            raise UserError(
                f"a text holds half of a character ({half.group()!r}, a lone surrogate, at place {half.start()}): "
                "write the whole character, or leave it out"
            )


def _compose(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _join(parts: list[Ids]) -> Ids:
    if len(parts) == 1:
        return parts[0]
    joined: list[int] = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]).tolist()
    return joined
