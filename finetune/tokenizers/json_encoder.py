"""A tokenizer.json by the library that defines it, with tokens that other files add, as transformers adds them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.families.family import TokenizerFacts
from finetune.families.text_backends import BytePairBackend, Ids, UnsupportedTokenizerError
from finetune.tokenizers.added_tokens import AddedToken, read_folder_tokens
from finetune.tokenizers.token_encoder import NamedIds, Spelling, TokenEncoder, TokenTable, named_ids
from finetune.tokenizers.token_splitter import TokenSplitter

_OPENER = "\ue0f4\ue0f5"
"""Of private characters: no text has it."""


class JsonEncoder(TokenEncoder):
    """Text to ids and back by `tokenizers.Tokenizer` alone.

    Args:
        tokenizer: With all its tokens.
        table: These.
        named: The ids of roles.
        splits_special: Whether names of special tokens in data are plain text.
    """

    def __init__(self, tokenizer: Any, table: TokenTable, named: NamedIds, *, splits_special: bool):
        super().__init__(BytePairBackend(tokenizer), table, named, Spelling(splits_special=splits_special))
        steps = json.loads(tokenizer.to_str())
        self._is_first_only = '"first"' in json.dumps([steps["normalizer"], steps["pre_tokenizer"]])
        self._tokenizer = tokenizer
        self._of_templates, self._of_data = _with_opener(tokenizer), _with_opener(tokenizer)
        self._of_data.encode_special_tokens = splits_special

    @property
    def marks_inner_text(self) -> bool:
        """Whether text that follows a token is spelled otherwise than text that begins."""
        return self._is_first_only

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without the special tokens; blanks are left as the ids have them."""
        skipped = self._special_ids | self._framing
        kept = [index for index in map(int, ids) if index not in skipped]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False)) if kept else ""

    def _encode(self, texts: Sequence[str], splitter: TokenSplitter, *, inner: bool) -> Sequence[Ids]:
        tokenizer = self._of_templates if splitter is self._all else self._of_data
        if not (inner and self._is_first_only):
            return [found.ids for found in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        # The library tells by the place in the text whether a blank comes in front.
        behind = [_OPENER + text for text in texts]
        return [found.ids[1:] for found in tokenizer.encode_batch_fast(behind, add_special_tokens=False)]


def open_json_encoder(
    path: Path, facts: TokenizerFacts, defaults: Mapping[str, str], *, splits_special: bool
) -> JsonEncoder:
    """Reads a tokenizer.json and the files beside it.

    Args:
        path: The file.
        facts: The family's.
        defaults: Names by role that its class has where no file gives them.
        splits_special: Whether names of special tokens in data are plain text.

    Raises:
        UnsupportedTokenizerError: It cannot be read, or lacks a token that the family needs.
    """
    tokenizer = open_tokenizer(path)
    found = read_folder_tokens(path.parent, defaults)
    _set_prefix(tokenizer, has_prefix=bool(found.config.get("add_prefix_space")))
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for name, token in found.tokens.items():
        if name not in known or _flags(token) != _flags(known[name]):
            _add(tokenizer, token)
    special = {name for name, token in found.tokens.items() if token.special}
    tokens = {
        token.content: AddedToken(
            token.content,
            special=token.special or token.content in special,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
            normalized=token.normalized,
        )
        for token in tokenizer.get_added_tokens_decoder().values()
    }
    ids = {name: int(tokenizer.token_to_id(name)) for name in tokens}
    named = named_ids(facts, found.roles, ids, tokenizer.token_to_id, config=found.config)
    if facts.opened_by_file:
        named = replace(named, prefix=(*_opening_ids(tokenizer), *named.prefix))
    table = TokenTable(tokens=tokens, ids=ids, num_tokens=tokenizer.get_vocab_size())
    return JsonEncoder(tokenizer, table, named, splits_special=splits_special)


def open_tokenizer(path: Path) -> Any:
    """A `tokenizers.Tokenizer` that neither cuts nor fills up.

    Raises:
        UnsupportedTokenizerError: The file cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise UnsupportedTokenizerError(f"{path.name} cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _set_prefix(tokenizer: Any, *, has_prefix: bool) -> None:
    """A blank in front of texts as the folder has it, where cutting into words is one step: transformers does so too."""
    from tokenizers import pre_tokenizers

    step = tokenizer.pre_tokenizer
    if isinstance(step, pre_tokenizers.ByteLevel) and step.add_prefix_space != has_prefix:
        step.add_prefix_space = has_prefix
        tokenizer.pre_tokenizer = step


def _opening_ids(tokenizer: Any) -> tuple[int, ...]:
    """What the file's own last step puts in front of a text."""
    bare, framed = (tokenizer.encode("0", add_special_tokens=adds).ids for adds in (False, True))
    starts = (start for start in range(len(framed)) if framed[start : start + len(bare)] == bare)
    return tuple(framed[: next(starts, 0)])


def _flags(token: Any) -> tuple[bool, ...]:
    return token.special, token.lstrip, token.rstrip, token.single_word, token.normalized


def _add(tokenizer: Any, token: AddedToken) -> None:
    from tokenizers import AddedToken as LibraryToken

    add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
    add([
        LibraryToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
            special=token.special,
        )
    ])  # fmt: skip


def _with_opener(tokenizer: Any) -> Any:
    """A copy with one token more, which stands for whatever token comes before a text."""
    from tokenizers import Tokenizer

    try:
        copied = Tokenizer.from_str(tokenizer.to_str())
    except Exception as error:  # plain Exception again: two names of one id, of which only one is written
        raise UnsupportedTokenizerError(f"its vocabulary is contradictory: {error}") from None
    _add(copied, AddedToken(_OPENER, special=False))
    return copied
