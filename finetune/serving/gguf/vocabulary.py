"""The tokenizer of a model's folder as GGUF keeps it: tokens by id with their types, scores or merges, and roles.

llama.cpp has its own code for two kinds: "llama", SentencePiece's byte-pair encoding by scores, and "gpt2", byte-level
merges after a cut by one of the patterns that it has by name. Whatever a file asks for besides is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.family import TokenizerFacts
from finetune.families.text_patterns import BLOOM_PATTERN, GPT2_PATTERN, LLAMA3_PATTERN, QWEN_PATTERN
from finetune.families.tokenizer_kinds import KINDS
from finetune.storage.files import read_json_object, read_text
from finetune.tokenizers.added_tokens import FolderTokens, read_folder_tokens

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, SentencePiece's numbers and GGUF's."""

_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_BLANK = "▁"
_PRE_NAMES = {
    # pattern, whether whole words that are tokens need no merges -> llama.cpp's name
    (GPT2_PATTERN, False): "gpt-2",
    (QWEN_PATTERN, False): "qwen2",
    (LLAMA3_PATTERN, False): "smaug-bpe",
    (LLAMA3_PATTERN, True): "llama-bpe",
    (BLOOM_PATTERN, False): "bloom",
}
_FILE_PATTERNS = {"Qwen2Tokenizer": QWEN_PATTERN, "GPTTokenizer": GPT2_PATTERN, "GPT2Tokenizer": GPT2_PATTERN}
_PIECE_FILES = ("sentencepiece.bpe.model", "tokenizer.model")
_GENERAL_CLASSES = ("PreTrainedTokenizerFast", "PreTrainedTokenizer")
_BYTES = {f"<0x{value:02X}>" for value in range(256)}


@dataclass
class Vocabulary:
    """A tokenizer in GGUF's terms.

    Attributes:
        model: "llama" or "gpt2".
        tokens: By id.
        types: By id.
        scores: By id, for "llama".
        merges: Two pieces with a blank between, in their order, for "gpt2".
        pre: Name of the pattern that cuts texts, for "gpt2".
        roles: Ids by role ("bos", "eos", "unk", "pad").
        adds_bos: Whether texts begin with that token.
        has_prefix: Whether a blank comes in front of texts.
    """

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    roles: dict[str, int] = field(default_factory=dict)
    adds_bos: bool = False
    has_prefix: bool = False

    def find(self, name: str) -> int | None:
        """Id of the token that a role or a text names."""
        if name in self.roles:
            return self.roles[name]
        return self.tokens.index(name) if name in self.tokens else None

    def put(self, name: str, index: int, kind: int) -> None:
        """Gives a token its place; ids in between that nothing has are unused."""
        self.fill(index + 1)
        if self.model == "llama" and kind == USER_DEFINED:
            name = name.replace(_BLANK, " ")
        if self.tokens[index] != name and self.types[index] != UNUSED:
            raise UserError(
                f"the tokenizer's files give id {index} to {self.tokens[index]!r} and to {name!r}: use the "
                "published files, or those that a run wrote"
            )
        fresh = self.types[index] == UNUSED
        self.tokens[index], self.types[index] = name, kind
        if self.scores and fresh:
            self.scores[index] = _ADDED_SCORE

    def fill(self, size: int) -> None:
        """Gives ids without a token names of their own, up to that many."""
        for index in range(len(self.tokens), size):
            self.tokens.append(f"[PAD{index}]")
            self.types.append(UNUSED)
            if self.model == "llama":
                self.scores.append(_UNUSED_SCORE)


def read_vocabulary(folder: Path, facts: TokenizerFacts, num_rows: int) -> Vocabulary:
    """The tokenizer of a folder.

    Args:
        folder: Of the model.
        facts: How the family frames its sequences.
        num_rows: Rows of the embedding; ids behind the last token are unused.

    Raises:
        UserError: A tokenizer that llama.cpp has no code for, or one with more tokens than rows.
    """
    path = next((folder / name for name in _PIECE_FILES if (folder / name).is_file()), None)
    if path is not None and (model := _parse_pieces(path)) is not None:
        vocabulary = _sentencepiece(path, model)
    elif (folder / "tokenizer.json").is_file():
        vocabulary = _tokenizer_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary = _vocab_and_merges(folder, facts)
    elif path is not None:
        raise UserError(
            f"{path} is no SentencePiece file, and ranks of tiktoken cannot be written to GGUF: put the model's "
            "tokenizer.json beside it"
        )
    else:
        names = ", ".join((*_PIECE_FILES, "tokenizer.json", "vocab.json with merges.txt"))
        raise UserError(f"{folder} holds no tokenizer that GGUF can have: it needs one of {names}")
    _add_named(vocabulary, _folder_tokens(folder, facts, vocabulary), facts)
    if len(vocabulary.tokens) > num_rows:
        raise UserError(
            f"{folder}: the tokenizer has {len(vocabulary.tokens)} tokens, but the embedding {num_rows} rows: use "
            "the tokenizer that the model was trained with"
        )
    vocabulary.fill(num_rows)
    return vocabulary


def _class_name(folder: Path, facts: TokenizerFacts) -> str:
    path = folder / "tokenizer_config.json"
    named = read_json_object(path).get("tokenizer_class") if path.is_file() else None
    own = facts.tokenizer_class.rpartition(".")[2]
    name = own if named is None or named in _GENERAL_CLASSES else str(named)
    return name.removesuffix("Fast")


def _folder_tokens(folder: Path, facts: TokenizerFacts, vocabulary: Vocabulary) -> FolderTokens:
    """What the files name; of the roles that the class has by itself those whose tokens are there."""
    kind = KINDS.get(_class_name(folder, facts))
    there = {*vocabulary.tokens, *read_folder_tokens(folder).tokens}
    roles = kind.roles if kind else {}
    return read_folder_tokens(folder, {role: name for role, name in roles.items() if name in there})


def _add_named(vocabulary: Vocabulary, tokens: FolderTokens, facts: TokenizerFacts) -> None:
    """Puts the tokens beside the pieces in, and notes roles."""
    places = {name: index for index, name in enumerate(vocabulary.tokens)}
    ids = tokens.number(places.get, len(vocabulary.tokens))
    for name, index in sorted(ids.items(), key=lambda item: item[1]):
        if name not in tokens.tokens:
            continue
        kind = CONTROL if tokens.tokens[name].special else USER_DEFINED
        if index < len(vocabulary.types) and vocabulary.types[index] in (UNKNOWN, BYTE):
            kind = vocabulary.types[index]
        vocabulary.put(name, index, kind)
    for role in ("bos", "eos", "unk", "pad"):
        named = tokens.roles.get(f"{role}_token")
        if named in ids:
            vocabulary.roles[role] = ids[named]
    if vocabulary.find(facts.end_of_answer) is None:
        raise UserError("the tokenizer names no end of an answer: put its special_tokens_map.json there")
    vocabulary.roles.setdefault("eos", vocabulary.find(facts.end_of_answer) or 0)
    if (padding := vocabulary.find(facts.pad_fallback)) is not None:
        vocabulary.roles.setdefault("pad", padding)
    adds, opens = tokens.config.get("add_bos_token"), "bos" in facts.prefix
    read = facts.reads_add_bos and tokens.config.get("tokenizer_class") not in _GENERAL_CLASSES
    vocabulary.adds_bos = (adds if read and isinstance(adds, bool) else opens) and "bos" in vocabulary.roles


def _parse_pieces(path: Path) -> Any:
    """What a SentencePiece file holds; None where it is none."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        return None
    return model if len(model.pieces) else None


def _sentencepiece(path: Path, model: Any) -> Vocabulary:
    trained, normal = model.trainer_spec, model.normalizer_spec
    kinds = {number: name for name, number in type(trained).ModelType.items()}
    faults = []
    if kinds.get(trained.model_type) != "BPE":
        faults.append(
            f"model type {kinds.get(trained.model_type)}, of which llama.cpp's Llama knows BPE alone"
        )
    if normal.precompiled_charsmap:
        faults.append(f"the normaliser {normal.name or 'of its own'}, which llama.cpp does not apply")
    if normal.remove_extra_whitespaces:
        faults.append("blanks that are taken away, which llama.cpp keeps")
    if missing := _BYTES - {piece.piece for piece in model.pieces if piece.type == BYTE}:
        faults.append(f"no piece for {len(missing)} of the bytes, which llama.cpp needs")
    if faults:
        raise UserError([f"{path} cannot be written to GGUF: it has {fault}" for fault in faults])
    return Vocabulary(
        "llama",
        [piece.piece for piece in model.pieces],
        [piece.type for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        has_prefix=bool(normal.add_dummy_prefix),
    )


def _tokenizer_json(path: Path) -> Vocabulary:
    content = read_json_object(path)
    model = content.get("model") or {}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise _refused(path, f"model type {model.get('type')!r}", "BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise _refused(path, f"{name} {model[name]!r}", "byte-level merges, none of it")
    if (normal := content.get("normalizer")) and normal.get("type") != "NFC":
        raise _refused(path, f"normalizer {normal.get('type')!r}", "none, NFC")
    pattern = _pattern(path, content.get("pre_tokenizer") or {})
    pre = _pre_name(path, pattern, ignores_merges=bool(model.get("ignore_merges")))
    merges = [each if isinstance(each, str) else " ".join(each) for each in model.get("merges") or ()]
    return _byte_level(path, model["vocab"], merges, pre)


def _pattern(path: Path, step: Mapping[str, Any]) -> str:
    """The regular expression that cuts texts before merging."""
    steps = step.get("pretokenizers") or [] if step.get("type") == "Sequence" else [step]
    *cuts, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _refused(
            path, f"pre_tokenizer {last.get('type')!r}", "ByteLevel without add_prefix_space at the end"
        )
    if not cuts and last.get("use_regex", True):
        return GPT2_PATTERN
    regex = (cuts[0].get("pattern") or {}).get("Regex") if len(cuts) == 1 else None
    if regex is None or last.get("use_regex", True) or cuts[0].get("behavior") != "Isolated":
        raise _refused(
            path, f"pre_tokenizer steps {[each.get('type') for each in steps]}", "one Split, ByteLevel"
        )
    return str(regex)


def _pre_name(path: Path, pattern: str, *, ignores_merges: bool) -> str:
    name = _PRE_NAMES.get((pattern, ignores_merges))
    if name is None:
        what = f"the pattern {pattern!r}" + (" with ignore_merges" if ignores_merges else "")
        raise _refused(path, what, "those of GPT-2, Qwen 2, Llama 3 and BLOOM")
    return name


def _vocab_and_merges(folder: Path, facts: TokenizerFacts) -> Vocabulary:
    path, name = folder / "vocab.json", _class_name(folder, facts)
    if name not in _FILE_PATTERNS:
        raise _refused(path, f"tokenizer_class {name!r}", ", ".join(_FILE_PATTERNS))
    lines = read_text(folder / "merges.txt").split("\n")
    merges = [line for line in lines[lines[0].startswith("#version") :] if line.strip()]
    pre = _pre_name(path, _FILE_PATTERNS[name], ignores_merges=False)
    return _byte_level(path, read_json_object(path), merges, pre)


def _byte_level(path: Path, ids: Mapping[str, Any], merges: list[str], pre: str) -> Vocabulary:
    number: Callable[[tuple[str, Any]], int] = lambda item: int(item[1])  # noqa: E731
    vocabulary = Vocabulary("gpt2", [], [], merges=merges, pre=pre)
    for name, index in sorted(ids.items(), key=number):
        vocabulary.put(name, int(index), NORMAL)
    return vocabulary


def _refused(path: Path, found: str, allowed: str) -> UserError:
    return UserError(f"{path} has {found}, which cannot be written to GGUF; allowed: {allowed}")
