"""Tokenizers trained here in the formats in which models are published, and what defines their ids."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.families.gemma.tokenizer_pieces import GEMMA_PIECES
from finetune.models.tiny.checkpoint import DEFAULT_CORPUS, build_tiny
from finetune.models.tiny.sentencepiece_training import (
    corpus_lines,
    train_sentencepiece,
)
from finetune.models.tiny.tiktoken_training import train_ranks
from tests.reference import tokenizer_definitions as definitions
from tests.reference.tokenizer_definitions import LLAMA3_PATTERN, Reader
from tests.texts import draw_passages

TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_NAMES = (
    *(
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
    ),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "<pad>", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
)
NUM_TEKKEN_SPECIAL = 40
_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
_PHI3_NAMES = {
    "<|endoftext|>": False, "<|assistant|>": True, "<|placeholder1|>": True, "<|placeholder2|>": True,
    "<|placeholder3|>": True, "<|placeholder4|>": True, "<|system|>": True, "<|end|>": True,
    "<|placeholder5|>": True, "<|placeholder6|>": True, "<|user|>": True,
}  # fmt: skip
"""Whether blanks behind them belong to them."""
_GEMMA_PIECES = (
    *(
        "<start_of_turn>",
        "<end_of_turn>",
        "<unused0>",
        "[toxicity=0]",
        "<table>",
        "</table>",
        "<h1>",
        "</h1>",
    ),
    *("\n" * count for count in range(1, 6)),
    *("\u2581" * count for count in range(2, 32)),
    *("\t" * count for count in range(1, 4)),
)

_GEMMA_CONTROL = {**GEMMA_PIECES, "add_dummy_prefix": False}


@dataclass(frozen=True, kw_only=True)
class PublishedKind:
    """A format.

    Attributes:
        family: Name of the family whose models have it.
        make: Writes the files into the folder of a tiny model.
        references: The readers that define the ids; None for transformers alone.
        names: Special tokens that texts are tried with.
    """

    family: str
    make: Callable[[Path], None]
    references: Callable[[Path], dict[bool, Reader]] | None
    names: tuple[str, ...]


def _leave(folder: Path) -> None:
    """The tiny model's own files are of the published form."""


def _remove_tokenizer(folder: Path) -> None:
    for pattern in ("tokenizer*", "*.model", "vocab.json", "merges.txt", "special_tokens_map.json"):
        for path in folder.glob(pattern):
            path.unlink()


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _ranks(count: int) -> list[bytes]:
    lines = train_ranks(DEFAULT_CORPUS, vocab_size=count, num_control_tokens=0).splitlines()
    pieces = [base64.b64decode(line.split()[0]) for line in lines]
    return [*sorted(pieces[:256]), *pieces[256:]]


def _make_llama3_ranks(folder: Path) -> None:
    _remove_tokenizer(folder)
    ranks = train_ranks(DEFAULT_CORPUS, vocab_size=900, num_control_tokens=0)
    (folder / "tokenizer.model").write_bytes(ranks)


def _make_tekken(folder: Path) -> None:
    _remove_tokenizer(folder)
    pieces = _ranks(900)
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate(pieces)
    ]
    config = {
        **{"pattern": TEKKEN_PATTERN, "num_vocab_tokens": len(pieces), "version": "v3"},
        "default_vocab_size": NUM_TEKKEN_SPECIAL + len(pieces) - 20,
        "default_num_special_tokens": NUM_TEKKEN_SPECIAL,
    }
    special = [
        {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(TEKKEN_NAMES)
    ]
    _write_json(folder / "tekken.json", {"config": config, "vocab": vocab, "special_tokens": special})


def _make_json(
    steps: Callable[[], Any],
    names: tuple[str, ...],
    settings: dict[str, Any],
    *,
    special_first: bool = False,
    ignores_merges: bool = False,
) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

        tokenizer = Tokenizer(models.BPE(ignore_merges=ignores_merges))
        tokenizer.pre_tokenizer = steps()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=list(names) if special_first else [],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(list(corpus_lines(DEFAULT_CORPUS)), trainer)
        tokenizer.add_special_tokens(list(names))
        _remove_tokenizer(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        _write_json(
            folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
        )

    return make


def _byte_steps(*first: Any, use_regex: bool = False) -> Any:
    from tokenizers import pre_tokenizers

    bytes_step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*first, bytes_step])


def _split_by(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _falcon_steps() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            pre_tokenizers.Digits(individual_digits=False),
            _split_by("[0-9][0-9][0-9]"),
        ]
    )


def _llama3_steps() -> Any:
    return _byte_steps(_split_by(LLAMA3_PATTERN))


def _granite_steps() -> Any:
    from tokenizers import pre_tokenizers

    return _byte_steps(pre_tokenizers.Digits(individual_digits=True), use_regex=True)


def _xverse_steps() -> Any:
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    return _byte_steps(pre_tokenizers.Punctuation(), digits, use_regex=True)


def _make_gemma(folder: Path) -> None:
    """Names, line breaks and runs of blanks are pieces that SentencePiece finds in any text."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "texts.txt"
        corpus.write_text("\n".join(draw_passages(60_000)), encoding="utf-8")
        trained = train_sentencepiece(corpus, vocab_size=900, control_pieces=_GEMMA_CONTROL)
    content = with_user_defined(trained, _GEMMA_PIECES)
    for path in folder.glob("*.model"):
        path.write_bytes(content)
    names = ("<start_of_turn>", "<end_of_turn>")
    processor = definitions.open_sentencepiece(content)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "additional_special_tokens": list(names),
        "added_tokens_decoder": {
            str(processor.piece_to_id(name)): {"content": name, **_FLAGS}
            for name in ("<pad>", "<eos>", "<bos>", "<unk>", *names)
        },
    }
    _write_json(path, settings)
    _resize(folder, processor.get_piece_size())


def with_user_defined(content: bytes, texts: tuple[str, ...]) -> bytes:
    """A SentencePiece model in which pieces are user-defined: those that it has, and new ones behind the others."""
    for text in (each.encode() for each in texts):
        inside = b"\x0a" + bytes([len(text)]) + text + b"\x15"
        entry = re.compile(re.escape(b"\x0a" + bytes([len(inside) + 4]) + inside) + b"....", re.S)
        made = b"\x0a" + bytes([len(inside) + 6]) + inside + b"\x00\x00\x00\x00\x18\x04"
        content = entry.sub(lambda _, made=made: made, content) if entry.search(content) else content + made
    return content


def _make_phi3(folder: Path) -> None:
    """Llama's vocabulary with the tokens of a chat behind it."""
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    path = folder / "tokenizer_config.json"
    added = {
        str(size + place): {"content": name, **_FLAGS, "rstrip": strips}
        for place, (name, strips) in enumerate(_PHI3_NAMES.items())
    }
    added["2"] = {"content": "</s>", **_FLAGS, "rstrip": True, "special": False}
    settings = json.loads(path.read_text()) | {
        **{"added_tokens_decoder": added, "legacy": False, "add_bos_token": False},
        **{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    }
    _write_json(path, settings)
    _resize(folder, size + len(_PHI3_NAMES))


def _resize(folder: Path, size: int) -> None:
    path = folder / "config.json"
    _write_json(path, json.loads(path.read_text()) | {"vocab_size": size})


_END = "<|endoftext|>"
_LLAMA3_CHAT = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
_NEMO = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_LLAMA3 = {"bos_token": _LLAMA3_CHAT[0], "eos_token": _LLAMA3_CHAT[4]}
_XVERSE_NAMES = ("<unk>", "<pad>", "<|startoftext|>", _END)
_GRANITE_NAMES = (
    *("<|end_of_text|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>"),
    *("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
)
_SMOLLM3_NAMES = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_FALCON_NAMES = (
    *(">>TITLE<<", ">>ABSTRACT<<", ">>INTRODUCTION<<", ">>SUMMARY<<", ">>COMMENT<<", ">>ANSWER<<"),
    *(">>QUESTION<<", ">>DOMAIN<<", ">>PREFIX<<", ">>SUFFIX<<", ">>MIDDLE<<", _END),
)

KINDS = {
    "chatglm": PublishedKind(
        family="chatglm", make=_leave, references=definitions.chatglm, names=definitions.CHATGLM_NAMES
    ),
    "GLM-4, first form": PublishedKind(
        family="chatglm4", make=_leave, references=definitions.chatglm4, names=definitions.GLM4_NAMES
    ),
    "llama 3, tokenizer.model": PublishedKind(
        family="llama", make=_make_llama3_ranks, references=definitions.llama3, names=_LLAMA3_CHAT
    ),
    "llama 3, tokenizer.json": PublishedKind(
        family="llama",
        make=_make_json(_llama3_steps, _LLAMA3_CHAT, _LLAMA3, ignores_merges=True),
        references=definitions.json_file,
        names=_LLAMA3_CHAT,
    ),
    "mistral, tekken.json": PublishedKind(
        family="mistral", make=_make_tekken, references=definitions.tekken, names=TEKKEN_NAMES
    ),
    "mistral, tokenizer.json of Nemo": PublishedKind(
        family="mistral",
        make=_make_json(
            lambda: _byte_steps(_split_by(TEKKEN_PATTERN)),
            TEKKEN_NAMES,
            _NEMO,
            special_first=True,
            ignores_merges=True,
        ),
        references=definitions.json_file,
        names=TEKKEN_NAMES,
    ),
    "internlm": PublishedKind(
        family="internlm",
        make=_leave,
        references=definitions.named_pieces,
        names=("<s>", "</s>", "<eoh>", "<eoa>"),
    ),
    "internlm2": PublishedKind(
        family="internlm2",
        make=_leave,
        references=definitions.named_pieces,
        names=("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    ),
    "baichuan": PublishedKind(
        family="baichuan",
        make=_leave,
        references=definitions.separate_pieces,
        names=("<s>", "</s>", "<reserved_102>", "<reserved_103>"),
    ),
    "baichuan2": PublishedKind(
        family="baichuan2",
        make=_leave,
        references=definitions.separate_pieces,
        names=("<s>", "</s>", "<reserved_106>", "<reserved_107>"),
    ),
    "glm4": PublishedKind(
        family="glm4",
        make=_make_json(
            _llama3_steps,
            definitions.GLM4_NAMES,
            {"eos_token": _END, "pad_token": _END},
        ),
        references=definitions.json_file,
        names=definitions.GLM4_NAMES,
    ),
    "falcon": PublishedKind(
        family="falcon",
        make=_make_json(_falcon_steps, _FALCON_NAMES, {"eos_token": _END}, special_first=True),
        references=definitions.json_file,
        names=_FALCON_NAMES,
    ),
    "granite": PublishedKind(
        family="granite",
        make=_make_json(_granite_steps, _GRANITE_NAMES, {"eos_token": _GRANITE_NAMES[0]}, special_first=True),
        references=definitions.json_file,
        names=_GRANITE_NAMES,
    ),
    "smollm3": PublishedKind(
        family="smollm3",
        make=_make_json(_llama3_steps, _SMOLLM3_NAMES, {"eos_token": "<|im_end|>"}, ignores_merges=True),
        references=definitions.json_file,
        names=_SMOLLM3_NAMES,
    ),
    "xverse": PublishedKind(
        family="xverse",
        make=_make_json(
            _xverse_steps,
            _XVERSE_NAMES,
            {"bos_token": _XVERSE_NAMES[2], "eos_token": _END, "pad_token": "<pad>", "unk_token": "<unk>"},
            special_first=True,
        ),
        references=definitions.json_file,
        names=_XVERSE_NAMES,
    ),
    "gpt2": PublishedKind(family="gpt2", make=_leave, references=None, names=(_END,)),
    "ernie4_5": PublishedKind(
        family="ernie4_5", make=_leave, references=None, names=("<s>", "</s>", "<unk>")
    ),
    "phi3": PublishedKind(
        family="phi3", make=_make_phi3, references=None, names=(*_PHI3_NAMES, "</s>", "<unk>")
    ),
    **{
        name: PublishedKind(
            family=name, make=_make_gemma, references=None, names=("<bos>", "<eos>", *_GEMMA_PIECES[:8])
        )
        for name in ("gemma2", "gemma3")
    },
}


def make_published(name: str, folder: Path) -> Path:
    """A tiny model with a tokenizer of a format."""
    kind = KINDS[name]
    build_tiny(kind.family, folder)
    kind.make(folder)
    return folder
