"""The tokenizer libraries themselves, behind one face: plain text to ids, many texts at a time.

A backend knows no special tokens: every text is text. PaddleNLP's tokenizers call the same libraries (or
write the same algorithm in Python) text by text; here they run on several threads and without Paddle.

Hugging Face's `tokenizers` serves byte-level files only. It reads neither SentencePiece's models nor tiktoken's
ranks: a model of 55,296 pieces, rebuilt as rules, takes 1.2 s to open where SentencePiece takes 0.05 s, 1.2 times
the processor time afterwards, and does not give the same ids for every text.
"""

from __future__ import annotations

import base64
import functools
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.storage.files import read_json_object


class UnsupportedTokenizerError(Exception):
    """These files may give other ids here than in PaddleNLP; the message says why."""


_TEXTS_AT_A_TIME = 16
Ids = list[int] | NDArray[Any]
"""The ids of one text, int32 where it is an array."""
TakeNames = Callable[[Path], tuple[bytes, dict[str, int]]]
"""A vocabulary file -> the serialised model in which no text is spelled with the names of tokens, and their ids."""


class TextBackend(Protocol):
    """Plain text to ids and back.

    Attributes:
        num_pieces: Size of the vocabulary.
    """

    num_pieces: int

    def encode_many(self, texts: Sequence[str], *, inner: bool = False) -> Sequence[Ids]:
        """The ids of each text.

        Args:
            texts: The texts.
            inner: Whether they follow other text, so that no blank is put in front where others get one.
        """
        ...

    def id_of(self, token: str) -> int | None:
        """The id of a piece by its text; None when there is no such piece."""
        ...

    def decode(self, ids: Sequence[int], *, inner: bool = False) -> str:
        """The text of ids, none of which is a special token; `inner` as for `encode_many`."""
        ...

    def piece(self, index: int) -> str:
        """One token, for people to read."""
        ...


# Behind a serialised model this sets normalizer_spec.add_dummy_prefix (field 3 in field 3) to false: what comes
# last counts in protocol buffers. The generated classes would clash with PaddleNLP's copy of them.
_NO_PREFIX = b"\x1a\x02\x18\x00"


def unprefixed_processor(content: bytes) -> Any:
    """The SentencePiece model of a file's content without the blank that it puts in front of texts."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content + _NO_PREFIX)
    return processor


class SentencePieceBackend:
    """A SentencePiece model that falls back to bytes.

    With bytes to fall back to, every piece of a text is a piece of the vocabulary, so that the detour
    over the pieces' texts, which PaddleNLP takes, ends at the same ids.

    Args:
        path: The model file.
        num_threads: Threads that texts are spread over.
        take_names: Reads the file as a model that spells no text with names of tokens, and gives their ids.

    Attributes:
        names: Ids of these.

    Raises:
        UnsupportedTokenizerError: The file is no such model.
    """

    def __init__(self, path: Path, num_threads: int, *, take_names: TakeNames | None = None):
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self._content, self.names = take_names(path) if take_names else (path.read_bytes(), {})
            self.processor.LoadFromSerializedProto(self._content)
        except (RuntimeError, OSError, ValueError):
            raise UnsupportedTokenizerError(f"{path.name} is no SentencePiece model") from None
        self.num_pieces = int(self.processor.get_piece_size())
        if sum(map(self.processor.is_byte, range(self.num_pieces))) != 256:
            raise UnsupportedTokenizerError(f"{path.name} has no bytes to fall back to")
        self._num_threads = num_threads

    def encode_many(self, texts: Sequence[str], *, inner: bool = False) -> list[Ids]:
        """The ids of each text; arrays where the library can give them, which spares it the Python objects."""
        processor = self._unprefixed if inner else self.processor
        out_type: Any = "numpy" if hasattr(processor, "EncodeAsNumpy") else int
        return list(processor.encode(list(texts), out_type=out_type, num_threads=self._num_threads))

    @functools.cached_property
    def _unprefixed(self) -> Any:
        """The same model without the blank that it puts in front of texts."""
        return unprefixed_processor(self._content)

    def control_ids(self) -> dict[str, int]:
        """Ids of the pieces that no text is spelled with, such as ``<s>``."""
        processor = self.processor
        return {
            str(processor.id_to_piece(index)): index
            for index in range(self.num_pieces)
            if processor.is_control(index)
        }

    def id_of(self, token: str) -> int | None:
        """The id of a piece, control tokens such as ``<s>`` included."""
        index = int(self.processor.piece_to_id(token))
        is_there = index != self.processor.unk_id() or token == self.processor.id_to_piece(index)
        return index if is_there else None

    def decode(self, ids: Sequence[int], *, inner: bool = False) -> str:
        """The text of ids."""
        processor = self._unprefixed if inner else self.processor
        return str(processor.decode(list(map(int, ids))))

    def piece(self, index: int) -> str:
        """One piece; ▁ stands for a blank."""
        return str(self.processor.id_to_piece(index))


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of a file of tiktoken's: lines of a token in base64 and a number.

    Raises:
        UnsupportedTokenizerError: The file is no rank file.
    """
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        return {base64.b64decode(token): int(rank) for token, rank in lines}
    except (ValueError, OSError):
        raise UnsupportedTokenizerError(f"{path.name} is no tiktoken rank file") from None


class TiktokenBackend:
    """Byte-level merging by rank, by tiktoken's library.

    Args:
        name: For messages of the library.
        ids: Ids of the pieces, which are their ranks or follow the same order.
        pattern: What cuts text before merging.
        special_ids: Ids of the special tokens by name.
        num_threads: Threads that texts are spread over.
    """

    def __init__(
        self,
        name: str,
        ids: Mapping[bytes, int],
        *,
        pattern: str,
        special_ids: Mapping[str, int],
        num_threads: int,
    ):
        import tiktoken

        self.special_ids = dict(special_ids)
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=dict(ids), special_tokens=self.special_ids
            )
        except (ValueError, KeyError) as error:  # an expression that is none
            raise UnsupportedTokenizerError(f"{name} cannot be used: {error}") from None
        self._num_threads = num_threads
        self.num_pieces = self._encoding.n_vocab

    def encode_many(self, texts: Sequence[str], *, inner: bool = False) -> list[Ids]:
        """The ids of each text as arrays.

        Threads get several texts at a time: to hand each over by itself costs a third of what its ids do.
        """
        if len(texts) <= _TEXTS_AT_A_TIME:
            return self._encode(texts)
        starts = range(0, len(texts), _TEXTS_AT_A_TIME)
        with ThreadPoolExecutor(self._num_threads) as pool:
            parts = pool.map(self._encode, [texts[start : start + _TEXTS_AT_A_TIME] for start in starts])
            return list(chain.from_iterable(parts))

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> Ids:
        found: NDArray[Any] = self._encoding.encode_to_numpy(text, disallowed_special=())
        return found.view(np.int32)

    def id_of(self, token: str) -> int | None:
        """The id of a control token."""
        return self.special_ids.get(token)

    def decode(self, ids: Sequence[int], *, inner: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._encoding.decode(list(map(int, ids)), errors="replace")

    def piece(self, index: int) -> str:
        """One token."""
        return self._encoding.decode_single_token_bytes(index).decode("utf-8", "replace")


class BytePairBackend:
    """A model of Hugging Face's `tokenizers` library without its added tokens.

    Args:
        tokenizer: A `tokenizers.Tokenizer` with a byte-level decoder.
        cut: Cuts a text as PaddleNLP does, by Python's `regex`, where that is another library than the
            tokenizer's; they know different versions of Unicode.
        of_words: The same model without the cutting; with `cut` only.
    """

    def __init__(
        self, tokenizer: Any, *, cut: Callable[[str], list[str]] | None = None, of_words: Any = None
    ):
        self._tokenizer, self._cut, self._of_words = tokenizer, cut, of_words
        self._settled: set[str] = set()
        self.num_pieces: int = tokenizer.get_vocab_size(with_added_tokens=False)

    def encode_many(self, texts: Sequence[str], *, inner: bool = False) -> list[list[int]]:
        """The ids of each text."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids: list[list[int]] = [encoding.ids for encoding in encodings]
        if self._cut is not None and (doubtful := self._find_doubtful(texts)):
            for number, text in enumerate(texts):
                if not doubtful.isdisjoint(text):
                    words = self._of_words.encode_batch_fast(self._cut(text), add_special_tokens=False)
                    ids[number] = [index for word in words for index in word.ids]
        return ids

    def _find_doubtful(self, texts: Sequence[str]) -> set[str]:
        """Characters that a version of Unicode does not have that is older than either library's: Python's."""
        new = set().union(*texts) - self._settled
        doubtful = {character for character in new if unicodedata.category(character) == "Cn"}
        self._settled |= new - doubtful
        return doubtful

    def id_of(self, token: str) -> int | None:
        """The id of a token of the base vocabulary."""
        index = self._tokenizer.token_to_id(token)
        return None if index is None else int(index)

    def decode(self, ids: Sequence[int], *, inner: bool = False) -> str:
        """The text of ids."""
        tokens = [self._tokenizer.id_to_token(int(index)) for index in ids]
        return str(self._tokenizer.decoder.decode(tokens))

    def piece(self, index: int) -> str:
        """One token."""
        token = self._tokenizer.id_to_token(index)
        return str(self._tokenizer.decoder.decode([token])) if token is not None else f"<{index}>"


def open_tokenizer_json(path: Path) -> tuple[Any, dict[str, int]]:
    """The tokenizer of a tokenizer.json without its added tokens, and the ids of these by name.

    Without them the library takes every text as text.
    """
    from tokenizers import Tokenizer

    content = read_json_object(path, keys=("added_tokens",))
    special = {entry["content"]: int(entry["id"]) for entry in content["added_tokens"]}
    bare: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps({**content, **bare})), special


def read_vocab_and_merges(vocab: Path, merges: Sequence[str], pattern: str) -> BytePairBackend:
    """Byte-level pair encoding from vocab.json and the rules of merges.txt.

    Raises:
        UnsupportedTokenizerError: The files cannot be read, or are such that the order in which the
            library applies the rules could make a difference.
    """
    import regex
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pairs = [tuple(line.split()) for line in merges]
    try:
        ids = read_json_object(vocab)
        _check_merges(pairs, ids)
        tokenizer = Tokenizer(models.BPE(ids, pairs))
        tokenizer.decoder = decoders.ByteLevel()
        # A second one; reading it back also finds rules whose results two names of one id have lost.
        of_words = Tokenizer.from_str(tokenizer.to_str())
    except UnsupportedTokenizerError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise UnsupportedTokenizerError(f"{vocab.name} and merges.txt do not fit together: {error}") from None
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_words.pre_tokenizer = as_bytes
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])
    return BytePairBackend(tokenizer, cut=regex.compile(pattern).findall, of_words=of_words)


def _check_merges(pairs: Sequence[tuple[str, ...]], ids: dict[str, int]) -> None:
    """Each rule makes a token that no other makes, from tokens made before it.

    Then the rule of the lowest rank anywhere in a word always comes before the rules that need its
    result, and it does not matter whether a pass applies one rule everywhere (PaddleNLP) or one place at a
    time (the library).
    """
    from tokenizers import pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    missing = [character for character in alphabet if character not in ids]
    if missing:
        raise UnsupportedTokenizerError(f"the vocabulary lacks {len(missing)} of the 256 bytes")
    known = set(alphabet)
    for number, pair in enumerate(pairs):
        token = "".join(pair)
        if len(pair) != 2 or not known.issuperset(pair) or token in known or token not in ids:
            raise UnsupportedTokenizerError(
                f"rule {number + 1} of merges.txt ({' '.join(pair)}) is out of order"
            )
        known.add(token)
