"""Tokenizers straight from a folder's files: the ids of `FamilyEncoder` without Paddle, and many times faster.

`load_fast_encoder` covers the tokenizers whose ids are known to be the same, file by file and setting by
setting, and gives a reason for every other folder; tests/models/test_fast_encoder.py compares the two on real
text and on nasty strings. A tokenizer is covered by an entry of `_KINDS`, under the name of PaddleNLP's class.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files import read_json_object
from finetune.models.family import Family
from finetune.models.text_backends import (
    Ids,
    SentencePieceBackend,
    TextBackend,
    TiktokenBackend,
    UnsupportedTokenizerError,
    read_tokenizer_json,
    read_vocab_and_merges,
)

NUM_THREADS = 2
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class _Special:
    """A special token; blanks beside its name are dropped with it where the flags say so."""

    index: int
    drops_left: bool = True
    drops_right: bool = True


class FastEncoder:
    """The same ids, decoded text and framing tokens as `finetune.models.tokenizer.FamilyEncoder`.

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
        parts: list[str | _Special] = []
        start = 0
        for match in self._pattern.finditer(text):
            parts += [text[start : match.start()], self._special[match.group()]]
            start = match.end()
        parts.append(text[start:])
        for place in range(1, len(parts), 2):
            token, before, after = parts[place], parts[place - 1], parts[place + 1]
            assert isinstance(token, _Special) and isinstance(before, str) and isinstance(after, str)
            parts[place - 1] = before.rstrip() if token.drops_left else before
            parts[place + 1] = after.lstrip() if token.drops_right else after
        return [
            index
            for part in parts
            for index in ([part.index] if isinstance(part, _Special) else self.encode(part))
        ]

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


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """One of PaddleNLP's tokenizer classes.

    Attributes:
        open: (vocabulary file, threads) -> the backend, and ids of special tokens that are no pieces.
        roles: The special tokens it has where the folder names none.
        wrapped: Roles whose tokens keep the blanks beside them, unless special_tokens_map.json names them.
        fixed_roles: Whether the roles are the class's own and what the folder names is not looked at.
        pattern: Names recognised in a template's text; None: all special tokens.
        drops_blanks: Whether tokens named by plain strings drop the blanks beside them.
        all_special: Whether every token of `open` is special, not just those with a role.
        composes: Whether texts are brought into Unicode's composed form (NFC) first.
        unset: Settings of tokenizer_config.json that must not be true.
    """

    open: Callable[[Path, int], tuple[TextBackend, dict[str, int]]]
    roles: Mapping[str, str] = field(default_factory=dict)
    wrapped: tuple[str, ...] = ()
    fixed_roles: bool = False
    pattern: str | None = None
    drops_blanks: bool = True
    all_special: bool = False
    composes: bool = False
    unset: tuple[str, ...] = ()


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

    def _find_kind(self) -> _Kind:
        default = self._facts.tokenizer_class.rpartition(".")[2]
        name: str | None = default
        if self._config is not None and not self._facts.own_class:
            name = self._config.get("tokenizer_class")
        if name not in _KINDS:
            raise UnsupportedTokenizerError(f"tokenizer class {name} is not among {', '.join(_KINDS)}")
        kind = _KINDS[name]
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
        if not path.is_file():
            return None
        try:
            return read_json_object(path)
        except UserError as error:
            raise UnsupportedTokenizerError(str(error)) from None


# --- the kinds ---

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3 has up to three digits in a piece, Qwen one.
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_PATTERN = _QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_LLAMA3_RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
_LLAMA3_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", *_LLAMA3_RESERVED[:4], "<|start_header_id|>"),
    *("<|end_header_id|>", _LLAMA3_RESERVED[4], "<|eot_id|>", *_LLAMA3_RESERVED[5:]),
)
_CHATGLM2_TOKENS = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
# As in finetune.models.chatglm2_tokenizer: "sop" is a token behind a mask only, "eop" nowhere.
_CHATGLM2_PATTERN = (
    "|".join(re.escape(name) for name in (*_CHATGLM2_TOKENS, "</s>") if name not in ("sop", "eop"))
    + r"|(?<=MASK\])sop"
)


def _open_sentencepiece(path: Path, num_threads: int) -> tuple[TextBackend, dict[str, int]]:
    backend = SentencePieceBackend(path, num_threads)
    return backend, {}


def _open_chatglm2(path: Path, num_threads: int) -> tuple[TextBackend, dict[str, int]]:
    backend = SentencePieceBackend(path, num_threads)
    pieces = [name for name in _CHATGLM2_TOKENS if backend.id_of(name) is not None]
    if pieces:
        raise UnsupportedTokenizerError(f"{path.name} has the pieces {', '.join(pieces)}")
    size = backend.processor.get_piece_size()
    return backend, {name: size + place for place, name in enumerate(_CHATGLM2_TOKENS)}


def _open_tiktoken(
    pattern: str, special_tokens: Sequence[str]
) -> Callable[[Path, int], tuple[TextBackend, dict[str, int]]]:
    def open_file(path: Path, num_threads: int) -> tuple[TextBackend, dict[str, int]]:
        backend = TiktokenBackend(
            path, pattern=pattern, special_tokens=special_tokens, num_threads=num_threads
        )
        return backend, dict(backend.special_ids)

    return open_file


def _open_bloom(path: Path, num_threads: int) -> tuple[TextBackend, dict[str, int]]:
    return read_tokenizer_json(path)


def _open_gpt(path: Path, num_threads: int) -> tuple[TextBackend, dict[str, int]]:
    return read_vocab_and_merges(path, _merges(path).split("\n")[1:-1], _GPT2_PATTERN), {}


def _open_qwen2(path: Path, num_threads: int) -> tuple[TextBackend, dict[str, int]]:
    lines = _merges(path).split("\n")
    if lines[0].startswith("#version:"):
        del lines[0]
    return read_vocab_and_merges(path, [line for line in lines if line.strip()], _QWEN_PATTERN), {}


def _merges(vocab: Path) -> str:
    try:
        return vocab.with_name("merges.txt").read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UnsupportedTokenizerError("merges.txt cannot be read") from None


_LLAMA_ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_GEMMA_ROLES = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
_END_OF_TEXT = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")

_KINDS: dict[str, _Kind] = {
    "LlamaTokenizer": _Kind(open=_open_sentencepiece, roles=_LLAMA_ROLES),
    "GemmaTokenizer": _Kind(open=_open_sentencepiece, roles=_GEMMA_ROLES, wrapped=tuple(_GEMMA_ROLES)),
    "ChatGLMv2Tokenizer": _Kind(
        open=_open_chatglm2,
        roles={"eos_token": "</s>", "pad_token": "<unk>"},
        fixed_roles=True,
        pattern=_CHATGLM2_PATTERN,
        drops_blanks=False,
        all_special=True,
    ),
    "QWenTokenizer": _Kind(
        open=_open_tiktoken(_QWEN_PATTERN, _QWEN_TOKENS),
        drops_blanks=False,
        all_special=True,
        composes=True,
    ),
    "Llama3Tokenizer": _Kind(
        open=_open_tiktoken(_LLAMA3_PATTERN, _LLAMA3_TOKENS),
        roles={
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "pad_token": "<|end_of_text|>",
        },
        drops_blanks=False,
        all_special=True,
        composes=True,
    ),
    "BloomTokenizer": _Kind(
        open=_open_bloom,
        roles={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    ),
    "Qwen2Tokenizer": _Kind(
        open=_open_qwen2, roles=_END_OF_TEXT, wrapped=("bos_token", *_END_OF_TEXT), composes=True
    ),
    "GPTTokenizer": _Kind(
        open=_open_gpt,
        roles=_END_OF_TEXT,
        wrapped=("eos_token", "unk_token"),
        unset=("add_prefix_space",),
    ),
}
