"""Tokenizers straight from a folder's files: the ids of `FamilyEncoder` without Paddle, and many times faster.

`load_fast_encoder` covers the tokenizers whose ids are known to be the same, file by file and setting by
setting, and gives a reason for every other folder; tests/tokenizers/test_fast_encoder.py compares the two on real
text and on nasty strings. A tokenizer is covered by an entry of
`finetune.families.tokenizer_kinds.KINDS`, under the name of PaddleNLP's class.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.family import Family
from finetune.families.text_backends import Ids, TextBackend, UnsupportedTokenizerError
from finetune.families.tokenizer_kinds import KINDS, TokenizerKind
from finetune.storage.files import is_present, read_json_object

NUM_THREADS = 2
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class _Special:
    """A special token; blanks beside its name are dropped with it where the flags say so."""

    index: int
    drops_left: bool = True
    drops_right: bool = True


class FastEncoder:
    """The same ids, decoded text and framing tokens as `finetune.tokenizers.encoder.FamilyEncoder`.

    Attributes:
        eos_token_id: Id that ends an answer.
        pad_token_id: Id that fills rows.
        prefix_ids: Ids that open every sequence.
        chat_end_ids: Further ids at which generation stops.
    """

    def __init__(
        self,
        backend: TextBackend,
        special: Mapping[str, _Special],
        pattern: re.Pattern[str],
        *,
        eos_token_id: int,
        pad_token_id: int,
        prefix_ids: tuple[int, ...],
        chat_end_ids: tuple[int, ...],
        skipped: frozenset[int],
        composes: bool = False,
    ):
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id
        self.prefix_ids, self.chat_end_ids = prefix_ids, chat_end_ids
        self._backend, self._special, self._pattern = backend, special, pattern
        self._composes = composes
        self._skipped = skipped | {eos_token_id, pad_token_id, *prefix_ids, *chat_end_ids}
        self._names = {token.index: name for name, token in special.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special token added or recognised."""
        return list(map(int, self.encode_many([text])[0])) if text else []

    def encode_many(self, texts: Sequence[str]) -> Sequence[Ids]:
        """Ids of each text (lists, or int32 arrays), on several threads; the interpreter is free meanwhile."""
        if self._composes:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        return self._backend.encode_many(texts)

    def encode_special(self, text: str) -> list[int]:
        """Ids of a template's own text, in which the names of special tokens stand for them."""
        if self._composes:
            text = unicodedata.normalize("NFC", text)
        ids: list[int] = []
        start = 0
        for match in self._pattern.finditer(text):
            token, before = self._special[match.group()], text[start : match.start()]
            ids += [*self.encode(before.rstrip() if token.drops_left else before), token.index]
            start = match.end()
            if token.drops_right:
                start = len(text) - len(text[start:].lstrip())
        return ids + self.encode(text[start:])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without the special tokens; blanks are left as the ids have them."""
        kept = [int(index) for index in ids if int(index) not in self._skipped]
        return self._backend.decode(kept) if kept else ""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token for people to read; special tokens by their names."""
        return [self._names.get(int(index)) or self._backend.piece(int(index)) for index in ids]


def load_fast_encoder(
    folder: str | Path, family: Family, *, num_threads: int = NUM_THREADS
) -> tuple[FastEncoder | None, str]:
    """The fast tokenizer of a folder.

    Args:
        folder: Holds the tokenizer's files.
        family: The model's.
        num_threads: Threads that texts are spread over.

    Returns:
        The encoder and "", or None and the reason why only PaddleNLP's own will do.
    """
    try:
        return _Loader(Path(folder), family, num_threads).load(), ""
    except UnsupportedTokenizerError as error:
        return None, str(error)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        return (
            None,
            f"its files hold values of another kind than a tokenizer has ({type(error).__name__}: {error})",
        )


class _Loader:
    """Follows what PaddleNLP makes of a folder, and gives up where that is not known."""

    def __init__(self, folder: Path, family: Family, num_threads: int):
        self._folder, self._facts, self._num_threads = folder, family.tokenizer, num_threads
        self._config = self._read("tokenizer_config.json")
        self._kind = self._find_kind()
        self._roles: dict[str, str] = {}
        self._flags: dict[str, tuple[bool, bool]] = {}

    def load(self) -> FastEncoder:
        """Raises UnsupportedTokenizerError where the ids might differ."""
        kind, facts = self._kind, self._facts
        names = [name for name in facts.vocab_files if (self._folder / name).is_file()]
        if not names:
            raise UnsupportedTokenizerError(f"{self._folder} holds none of {', '.join(facts.vocab_files)}")
        self._backend, self._extra = kind.open(self._folder / names[0], self._num_threads)
        self._read_added_tokens()
        self._read_special_tokens()
        special = {name: self._special(name) for name in self._all_special()}
        pad = "pad" if "pad_token" in self._roles else facts.pad_fallback
        prefix = tuple(map(self._token_id, facts.prefix))
        eos, pad_id = self._token_id(facts.end_of_answer), self._token_id(pad)
        ends = tuple(index for name in facts.chat_ends if (index := self._id_of(name)) is not None)
        role_ids = {token.index for name, token in special.items() if name in self._flags}
        longest_first = sorted(special, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) if kind.pattern is None else kind.pattern
        return FastEncoder(
            self._backend,
            special,
            re.compile(pattern or "(?!)"),
            eos_token_id=eos,
            pad_token_id=pad_id,
            prefix_ids=prefix,
            chat_end_ids=ends,
            skipped=frozenset(role_ids),
            composes=kind.composes,
        )

    def _find_kind(self) -> TokenizerKind:
        default = self._facts.tokenizer_class.rpartition(".")[2]
        name: str | None = default
        if self._config is not None and not self._facts.own_class:
            name = self._config.get("tokenizer_class")
        if not isinstance(name, str) or name not in KINDS:
            raise UnsupportedTokenizerError(f"tokenizer class {name} is not among {', '.join(KINDS)}")
        kind = KINDS[name]
        config = self._config or {}
        wrong = [key for key in (*kind.unset, "do_lower_case", "split_special_tokens") if config.get(key)]
        if config.get("sp_model_kwargs"):
            wrong.append("sp_model_kwargs")
        if wrong:
            raise UnsupportedTokenizerError(f"tokenizer_config.json sets {', '.join(wrong)}")
        return kind

    def _read_added_tokens(self) -> None:
        """Tokens beside the vocabulary file: their ids, where the folder gives them."""
        for index, token in ((self._config or {}).get("added_tokens_decoder") or {}).items():
            self._extra.setdefault(token["content"], int(index))
            if self._extra[token["content"]] != int(index) or (
                self._backend.id_of(token["content"]) not in (None, int(index))
            ):
                raise UnsupportedTokenizerError(f"{token['content']} has two ids")
        if (self._config or {}).get("added_tokens_decoder"):
            return
        added = self._read("added_tokens.json") or {}
        others = [name for name in added if self._id_of(name) != added[name]]
        if others:
            raise UnsupportedTokenizerError(f"added_tokens.json adds {', '.join(others[:3])}")

    def _read_special_tokens(self) -> None:
        kind = self._kind
        for role, name in kind.roles.items():
            self._add_role(role, name, is_wrapped=role in kind.wrapped)
        if kind.fixed_roles:
            return
        for source in (self._config or {}, self._read("special_tokens_map.json") or {}):
            for key, value in source.items():
                if key in _ROLES and value is not None:
                    self._add_role(key, value, is_wrapped=source is self._config and key in kind.wrapped)
                elif key == "additional_special_tokens" and isinstance(value, list):
                    for position, token in enumerate(value):
                        self._add_role(f"{key}[{position}]", token, is_wrapped=False)

    def _add_role(self, role: str, value: Any, *, is_wrapped: bool) -> None:
        name = value.get("content") if isinstance(value, dict) else value
        if not isinstance(name, str):
            raise UnsupportedTokenizerError(f"{role} is no text")
        self._roles[role] = name
        if isinstance(value, dict):
            self._flags[name] = (bool(value.get("lstrip")), bool(value.get("rstrip")))
        else:
            drops = self._kind.drops_blanks and not is_wrapped
            self._flags[name] = (drops, drops)

    def _all_special(self) -> list[str]:
        names = [*dict.fromkeys(self._roles.values())]
        return (
            [*names, *(name for name in self._extra if name not in names)]
            if self._kind.all_special
            else names
        )

    def _special(self, name: str) -> _Special:
        drops = self._flags.get(name, (self._kind.drops_blanks, self._kind.drops_blanks))
        index = self._id_of(name)
        if index is None:
            raise UnsupportedTokenizerError(f"special token {name} is not in the vocabulary")
        return _Special(index, *drops)

    def _id_of(self, name: str) -> int | None:
        index = self._extra.get(name)
        return index if index is not None else self._backend.id_of(name)

    def _token_id(self, name: str) -> int:
        """Id of a token by its role or its text."""
        index = self._id_of(self._roles.get(f"{name}_token", name))
        if index is None:
            raise UnsupportedTokenizerError(f"the tokenizer has no token {name}")
        return index

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._folder / name
        if not is_present(path):
            return None
        try:
            return read_json_object(path)
        except UserError as error:
            raise UnsupportedTokenizerError(str(error)) from None
