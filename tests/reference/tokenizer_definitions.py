"""Ids as the libraries that define them give them: SentencePiece, tiktoken and tokenizers, between special tokens.

Every function takes a model's folder and gives two readers: of texts in which special tokens are tokens (False), and
of texts in which they are text (True). Transformers is not needed.
"""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Ids = list[int]
Reader = Callable[[Sequence[str]], list[Ids]]
Spell = Callable[[str], Ids]

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_NAMES = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{number}|>" for number in range(205)),
)
CHATGLM2_NAMES = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
GLM4_NAMES = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
_RESERVED = [f"<|reserved_special_token_{number}|>" for number in range(251)]
LLAMA3_NAMES = (
    *("<|begin_of_text|>", "<|end_of_text|>", *_RESERVED[:4], "<|start_header_id|>", "<|end_header_id|>"),
    *(_RESERVED[4], "<|eot_id|>", *_RESERVED[5:]),
)
CHATGLM_NAMES = ("<unk>", "<sop>", "<eop>", "[MASK]", "[gMASK]", "[sMASK]", "<pad>", "<unused_0>")


def between_names(spell: Spell, ids: Mapping[str, int]) -> Spell:
    """Cuts a text at names of tokens, the longest of those that begin at a place, and spells each stretch by itself."""
    written = "|".join(re.escape(name) for name in sorted(ids, key=len, reverse=True))

    def read(text: str) -> Ids:
        parts = re.split(f"({written})", text) if written else [text]
        found = [[ids[part]] if place % 2 else spell(part) for place, part in enumerate(parts) if part]
        return [index for part in found for index in part]

    return read


def _both(with_tokens: Spell, as_text: Spell) -> dict[bool, Reader]:
    return {
        False: lambda texts: [with_tokens(text) for text in texts],
        True: lambda texts: [as_text(text) for text in texts],
    }


def read_rank_file(path: Path) -> dict[bytes, int]:
    """tiktoken's ranks."""
    lines = path.read_bytes().splitlines()
    return {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}


def _by_tiktoken(
    ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int], *, form: str | None = None
) -> dict[bool, Reader]:
    import tiktoken

    encoding = tiktoken.Encoding(
        "checked", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(special)
    )

    def read(text: str, allowed: Any) -> Ids:
        composed = unicodedata.normalize(form, text) if form else text  # type: ignore[arg-type]
        return encoding.encode(composed, allowed_special=allowed, disallowed_special=())

    return _both(lambda text: read(text, "all"), lambda text: read(text, set()))


def qwen(folder: Path) -> dict[bool, Reader]:
    """Qwen's: composed text."""
    ranks = read_rank_file(folder / "qwen.tiktoken")
    special = {name: len(ranks) + place for place, name in enumerate(QWEN_NAMES)}
    return _by_tiktoken(ranks, QWEN_PATTERN, special, form="NFC")


def llama3(folder: Path) -> dict[bool, Reader]:
    """Llama 3's tokenizer.model: 256 special tokens behind the ranks."""
    ranks = read_rank_file(folder / "tokenizer.model")
    special = {name: len(ranks) + place for place, name in enumerate(LLAMA3_NAMES)}
    return _by_tiktoken(ranks, LLAMA3_PATTERN, special)


def chatglm4(folder: Path) -> dict[bool, Reader]:
    """GLM-4's in its first form: 14 special tokens behind the ranks."""
    ranks = read_rank_file(folder / "tokenizer.model")
    special = {name: len(ranks) + place for place, name in enumerate(GLM4_NAMES)}
    return _by_tiktoken(ranks, LLAMA3_PATTERN, special)


def tekken(folder: Path) -> dict[bool, Reader]:
    """tekken.json: special tokens are the first ids, ranks follow."""
    content = json.loads((folder / "tekken.json").read_text())
    config = content["config"]
    offset = config["default_num_special_tokens"]
    vocab = content["vocab"][: config["default_vocab_size"] - offset]
    ranks = {base64.b64decode(each["token_bytes"]): each["rank"] for each in vocab}
    special = {
        each["token_str"]: len(ranks) + each["rank"]
        for each in content["special_tokens"]
        if each["token_str"]
    }
    readers = _by_tiktoken(ranks, config["pattern"], special)

    def moved(read: Reader) -> Reader:
        return lambda texts: [
            [index - len(ranks) if index >= len(ranks) else index + offset for index in ids]
            for ids in read(texts)
        ]

    return {splits: moved(read) for splits, read in readers.items()}


def open_sentencepiece(content: bytes) -> Any:
    """The processor of a model's bytes."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    return processor


def chatglm2(folder: Path) -> dict[bool, Reader]:
    """ChatGLM2's: "sop" is a token behind a mask only, "eop" nowhere."""
    model = open_sentencepiece((folder / "tokenizer.model").read_bytes())
    ids = {name: model.get_piece_size() + place for place, name in enumerate(CHATGLM2_NAMES)}
    ids["</s>"] = model.eos_id()
    written = "|".join(re.escape(name) for name in ids if name not in ("sop", "eop")) + r"|(?<=MASK\])sop"

    def read(text: str) -> Ids:
        parts = re.split(f"({written})", text)
        found = [[ids[part]] if place % 2 else model.encode(part) for place, part in enumerate(parts) if part]
        return [index for part in found for index in part]

    return _both(read, model.encode)


def chatglm(folder: Path) -> dict[bool, Reader]:
    """ChatGLM-6B's ice_text.model: pieces for line breaks, tabs and runs of blanks; ids behind those of images."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    content = (folder / "ice_text.model").read_bytes()
    model = open_sentencepiece(content)
    plain = open_sentencepiece(without_names(content, CHATGLM_NAMES))
    offset = settings["num_image_tokens"]

    def spell(text: str, processor: Any) -> Ids:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for size in range(80, 1, -1):
            text = text.replace(" " * size, f"<|blank_{size}|>")
        return [offset + index for index in processor.encode(text)]

    names = {name: offset + model.piece_to_id(name) for name in CHATGLM_NAMES}
    read = between_names(lambda text: spell(text, model), names)
    return _both(read, lambda text: spell(text, plain))


def user_defined(content: bytes) -> list[str]:
    """Pieces of a model that SentencePiece finds in any text."""
    return [
        text.decode() for text in re.findall(rb"\x0a.\x0a.([^\x0a]{1,60}?)\x15....\x18\x04", content, re.S)
    ]


def without_names(content: bytes, names: Sequence[str]) -> bytes:
    """The model in which user-defined pieces of these names are unused: a text is text."""
    for name in names:
        entry = re.compile(re.escape(name.encode()) + rb"(\x15....)\x18\x04", re.S)
        content = entry.sub(lambda found: found.group()[:-1] + b"\x05", content)
    return content


def _pieces(folder: Path, *, cut_at_names: bool) -> dict[bool, Reader]:
    content = (folder / "tokenizer.model").read_bytes()
    model = open_sentencepiece(content)
    names = user_defined(content)
    ids = {model.id_to_piece(index): index for index in range(3)}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = settings.get("added_tokens_decoder") or {}
    ids |= {each["content"]: int(index) for index, each in added.items()}
    if cut_at_names:
        ids |= {name: model.piece_to_id(name) for name in names}
    plain = open_sentencepiece(without_names(content, names))
    return _both(between_names(model.encode, ids), plain.encode)


def named_pieces(folder: Path) -> dict[bool, Reader]:
    """InternLM's: SentencePiece finds the names in the text itself; text behind them gets no blank in front."""
    return _pieces(folder, cut_at_names=False)


def separate_pieces(folder: Path) -> dict[bool, Reader]:
    """Baichuan's: the published code spells what stands between two names as a text of its own."""
    return _pieces(folder, cut_at_names=True)


def json_file(folder: Path) -> dict[bool, Reader]:
    """tokenizer.json by `tokenizers`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def read(texts: Sequence[str], *, splits: bool) -> list[Ids]:
        tokenizer.encode_special_tokens = splits
        return [each.ids for each in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    return {splits: lambda texts, splits=splits: read(texts, splits=splits) for splits in (False, True)}
