"""PaddleNLP's tokenizer classes as far as their ids are known: which library reads the file, and what is special."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.families.blank_pieces import CHATGLM_ROLES, CHATGLM_TOKENS, open_chatglm
from finetune.families.sentencepiece_names import take_names, take_user_defined
from finetune.families.tekken import TEKKEN_ROLES, open_tekken
from finetune.families.text_backends import (
    SentencePieceBackend,
    TakeNames,
    TextBackend,
    TiktokenBackend,
    UnsupportedTokenizerError,
    read_ranks,
    read_vocab_and_merges,
)
from finetune.families.text_patterns import GPT2_PATTERN, LLAMA3_PATTERN, QWEN_PATTERN
from finetune.storage.files import read_json_or_empty


@dataclass(frozen=True, kw_only=True)
class TokenizerKind:
    """One of PaddleNLP's tokenizer classes.

    Attributes:
        open: (vocabulary file, threads) -> the backend, and ids of special tokens that are no pieces.
        roles: The special tokens it has where the folder names none.
        names: Special tokens that it has by itself, pieces of the vocabulary or not.
        fixed_roles: Whether the roles are the class's own and what the folder names is not looked at.
        behind: Special tokens of `open` that are met in text only behind another text (None: nowhere).
        composes: Whether texts are brought into Unicode's composed form (NFC) first.
        has_prefix: Whether the vocabulary puts a blank in front of texts.
        marks_blanks: Whether blanks become SentencePiece's sign for them before names are looked for, prefix or not.
        first_only: Whether that blank comes in front of the first stretch of a text only, whatever the folder says.
        restarts: Whether it comes behind the tokens that the folder names, too; `names` are pieces within a text.
        rebuilt_by: Setting of tokenizer_config.json with which transformers reads this vocabulary and no tokenizer.json.
        numbers_on: Whether added tokens follow the vocabulary without gaps, whatever ids the folder gives them.
        types_prefix: Whether add_prefix_space in tokenizer_config.json puts a blank in front of texts.
        has_ordinary: Whether what `take_names` finds is special only by `names`, by the folder, or as a mark of a turn.
        take_names: vocabulary file -> the model in which no text is spelled with the names of tokens, and their ids; None
            where names are no pieces that SentencePiece finds in text.
    """

    open: Callable[[Path, int], tuple[TextBackend, dict[str, int]]]
    roles: Mapping[str, str] = field(default_factory=dict)
    names: Sequence[str] = ()
    fixed_roles: bool = False
    behind: Mapping[str, str | None] = field(default_factory=dict)
    composes: bool = False
    has_prefix: bool = False
    marks_blanks: bool = False
    first_only: bool = False
    restarts: bool = False
    rebuilt_by: str = ""
    numbers_on: bool = False
    types_prefix: bool = False
    has_ordinary: bool = False
    take_names: TakeNames | None = None


_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_LLAMA3_RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
_LLAMA3_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", *_LLAMA3_RESERVED[:4], "<|start_header_id|>"),
    *("<|end_header_id|>", _LLAMA3_RESERVED[4], "<|eot_id|>", *_LLAMA3_RESERVED[5:]),
)
CHATGLM2_TOKENS = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
GLM4_TOKENS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
CHATGLM2_PATTERN = (
    "|".join(re.escape(name) for name in (*CHATGLM2_TOKENS, "</s>") if name not in ("sop", "eop"))
    + r"|(?<=MASK\])sop"
)
"""Names that a template writes: "sop" is a token only behind the mask that it belongs to, "eop" nowhere."""


def _take_names(path: Path) -> tuple[bytes, dict[str, int]]:
    return take_names(path.read_bytes())


# normalizer_spec (field 3), behind what a file has of it: no map of characters (2), a blank in front for Llama (3),
# no blanks lost (4), a sign for each (5). transformers' classes do this to text whatever the file says.
_LLAMA_TEXT = bytes((0x1A, 8, 0x12, 0, 0x18, 1, 0x20, 0, 0x28, 1))
_GEMMA_TEXT = bytes((0x1A, 6, 0x12, 0, 0x20, 0, 0x28, 1))


def _take_llama(path: Path) -> tuple[bytes, dict[str, int]]:
    content, names = take_user_defined(path.read_bytes())
    return content + _LLAMA_TEXT, names


def _take_gemma(path: Path) -> tuple[bytes, dict[str, int]]:
    settings = read_json_or_empty(path.with_name("tokenizer_config.json"))
    added = (settings.get("added_tokens_decoder") or {}).values()
    # Runs that belong to the token before them are found with the tokens.
    eats_blanks = any(each.get("lstrip") or each.get("rstrip") for each in added)
    content, names = take_user_defined(path.read_bytes(), keeps_runs=not eats_blanks)
    return content + _GEMMA_TEXT, names


def _open_without(take: TakeNames) -> Callable[[Path, int], tuple[TextBackend, dict[str, int]]]:
    def open_file(path: Path, num_threads: int) -> tuple[TextBackend, dict[str, int]]:
        backend = SentencePieceBackend(path, num_threads, take_names=take)
        return backend, backend.control_ids() | backend.names

    return open_file


def _open_chatglm2(path: Path, num_threads: int) -> tuple[TextBackend, dict[str, int]]:
    backend = SentencePieceBackend(path, num_threads)
    pieces = [name for name in CHATGLM2_TOKENS if backend.id_of(name) is not None]
    if pieces:
        raise UnsupportedTokenizerError(f"{path.name} has the pieces {', '.join(pieces)}")
    size = backend.processor.get_piece_size()
    return backend, {name: size + place for place, name in enumerate(CHATGLM2_TOKENS)}


def _open_tiktoken(
    pattern: str, special_tokens: Sequence[str]
) -> Callable[[Path, int], tuple[TextBackend, dict[str, int]]]:
    def open_file(path: Path, num_threads: int) -> tuple[TextBackend, dict[str, int]]:
        ranks = read_ranks(path)
        special = {name: len(ranks) + place for place, name in enumerate(special_tokens)}
        backend = TiktokenBackend(
            path.stem, ranks, pattern=pattern, special_ids=special, num_threads=num_threads
        )
        return backend, special

    return open_file


open_glm4 = _open_tiktoken(LLAMA3_PATTERN, GLM4_TOKENS)
"""GLM-4's vocabulary in its first form: its special tokens follow the ranks."""


def _open_gpt(path: Path, num_threads: int) -> tuple[TextBackend, dict[str, int]]:
    return read_vocab_and_merges(path, _merges(path).split("\n")[1:-1], GPT2_PATTERN), {}


def _open_qwen2(path: Path, num_threads: int) -> tuple[TextBackend, dict[str, int]]:
    lines = _merges(path).split("\n")
    if lines[0].startswith("#version:"):
        del lines[0]
    return read_vocab_and_merges(path, [line for line in lines if line.strip()], QWEN_PATTERN), {}


def _merges(vocab: Path) -> str:
    try:
        return vocab.with_name("merges.txt").read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UnsupportedTokenizerError("merges.txt cannot be read") from None


_LLAMA_ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_GEMMA_ROLES = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
_GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")
_GLM4_ROLES = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
_END_OF_TEXT = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")

LLAMA3 = "Llama3Tokenizer"
TEKKEN = "TekkenTokenizer"

KINDS: dict[str, TokenizerKind] = {
    "LlamaTokenizer": TokenizerKind(
        open=_open_without(_take_llama),
        take_names=_take_llama,
        roles=_LLAMA_ROLES,
        has_ordinary=True,
        has_prefix=True,
        rebuilt_by="add_prefix_space",
        numbers_on=True,
    ),
    # Whether a blank comes in front is left to the vocabulary.
    "InternLMTokenizer": TokenizerKind(
        open=_open_without(_take_names),
        take_names=_take_names,
        roles=_LLAMA_ROLES,
        names=("<eoh>", "<eoa>"),
        first_only=True,
        restarts=True,
    ),
    "InternLM2Tokenizer": TokenizerKind(
        open=_open_without(_take_names), take_names=_take_names, roles=_LLAMA_ROLES, first_only=True
    ),
    # Every message of a conversation is spelled as a text of its own.
    "BaichuanTokenizer": TokenizerKind(
        open=_open_without(_take_names), take_names=_take_names, roles=_LLAMA_ROLES
    ),
    "GemmaTokenizer": TokenizerKind(
        open=_open_without(_take_gemma),
        take_names=_take_gemma,
        roles=_GEMMA_ROLES,
        names=_GEMMA_TURNS,
        has_ordinary=True,
        numbers_on=True,
        marks_blanks=True,
    ),
    "ChatGLMTokenizer": TokenizerKind(open=open_chatglm, roles=CHATGLM_ROLES, names=CHATGLM_TOKENS),
    "ChatGLMv2Tokenizer": TokenizerKind(
        open=_open_chatglm2,
        roles={"eos_token": "</s>", "pad_token": "<unk>"},
        names=CHATGLM2_TOKENS,
        fixed_roles=True,
        behind={"sop": "MASK]", "eop": None, "<unk>": None},
    ),
    "ChatGLM4Tokenizer": TokenizerKind(open=open_glm4, roles=_GLM4_ROLES, names=GLM4_TOKENS),
    "QWenTokenizer": TokenizerKind(
        open=_open_tiktoken(QWEN_PATTERN, _QWEN_TOKENS), names=_QWEN_TOKENS, composes=True
    ),
    LLAMA3: TokenizerKind(
        open=_open_tiktoken(LLAMA3_PATTERN, _LLAMA3_TOKENS),
        names=_LLAMA3_TOKENS,
        roles={
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "pad_token": "<|end_of_text|>",
        },
    ),
    TEKKEN: TokenizerKind(open=open_tekken, roles=TEKKEN_ROLES),
    "Qwen2Tokenizer": TokenizerKind(open=_open_qwen2, roles=_END_OF_TEXT, composes=True, numbers_on=True),
    "GPTTokenizer": TokenizerKind(open=_open_gpt, roles=_END_OF_TEXT, numbers_on=True, types_prefix=True),
}


def find_kind(tokenizer: Any) -> TokenizerKind | None:
    """The kind of a tokenizer of PaddleNLP; None for one that is not known here."""
    return KINDS.get(type(tokenizer).__name__)
