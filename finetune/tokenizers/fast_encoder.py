"""Tokenizers straight from a folder's files, without Paddle: the ids that transformers gives.

`load_fast_encoder` covers the tokenizers whose ids are known to be the same, file by file and setting by
setting, and gives a reason for every other folder. tests/reference/test_tokenizers.py compares with transformers,
tests/tokenizers/test_fast_encoder.py with PaddleNLP. Which files are read:

- tokenizer.json where it is the only vocabulary, or where tokenizer_config.json names a class that reads nothing
  else (`PreTrainedTokenizerFast`, `TokenizersBackend`); through the `tokenizers` library, as transformers does,
- tekken.json where it is the only vocabulary,
- otherwise the family's own vocabulary file, by the entry of `finetune.families.tokenizer_kinds.KINDS` for the
  class that the folder names, or for the family's own class where that name is not among them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.family import Family, TokenizerFacts
from finetune.families.tekken import TEKKEN_FILE
from finetune.families.text_backends import TextBackend, UnsupportedTokenizerError
from finetune.families.tokenizer_kinds import KINDS, LLAMA3, TEKKEN, TokenizerKind
from finetune.storage.files import read_json_object
from finetune.tokenizers.added_tokens import AddedToken, FolderTokens, read_folder_tokens
from finetune.tokenizers.json_encoder import open_json_encoder
from finetune.tokenizers.token_encoder import Spelling, TokenEncoder, TokenTable, named_ids

NUM_THREADS = 2
JSON_FILE = "tokenizer.json"
_TURN_MARK = re.compile(r"<\|[^|<>\s]+\|>")
_JSON_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_fast_encoder(
    folder: str | Path, family: Family, *, num_threads: int = NUM_THREADS, splits_special: bool = True
) -> tuple[TokenEncoder | None, str]:
    """The tokenizer of a folder.

    Args:
        folder: Holds the tokenizer's files.
        family: The model's.
        num_threads: Threads that texts are spread over.
        splits_special: Whether names of special tokens in data are plain text.

    Returns:
        The encoder and "", or None and the reason why only PaddleNLP's own will do.
    """
    try:
        return _load(Path(folder), family.tokenizer, num_threads, splits_special=splits_special), ""
    except (UnsupportedTokenizerError, UserError) as error:
        return None, str(error)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        return (
            None,
            f"its files hold values of another kind than a tokenizer has ({type(error).__name__}: {error})",
        )


def find_vocabulary(folder: Path, facts: TokenizerFacts) -> Path | None:
    """The vocabulary that a folder's tokenizer is read from; None where there is none."""
    own = next((folder / name for name in facts.vocab_files if (folder / name).is_file()), None)
    as_json = folder / JSON_FILE
    if as_json.is_file() and (own is None or _class_of(folder) in _JSON_CLASSES):
        return as_json
    tekken = folder / TEKKEN_FILE
    return tekken if own is None and tekken.is_file() else own


def class_name(folder: Path, facts: TokenizerFacts, vocabulary: Path) -> str:
    """Which entry of `KINDS` reads a vocabulary: what the folder names, else the family's own."""
    own = facts.tokenizer_class.rpartition(".")[2]
    named = _class_of(folder)
    if vocabulary.name == TEKKEN_FILE:
        return TEKKEN
    if vocabulary.suffix == ".model" and own == "LlamaTokenizer" and is_rank_file(vocabulary):
        return LLAMA3
    return own if facts.own_class or named not in KINDS else named


def default_roles(folder: Path, facts: TokenizerFacts) -> Mapping[str, str]:
    """The special tokens that the class of a folder with tokenizer.json has where no file names them."""
    kind = KINDS.get(_class_of(folder) or facts.tokenizer_class.rpartition(".")[2])
    return kind.roles if kind else {}


def is_rank_file(path: Path) -> bool:
    """Whether a file holds tiktoken's ranks: lines of a token in base64 and a number."""
    with path.open("rb") as file:
        token, _, rank = file.readline(512).strip().partition(b" ")
    return rank.isdigit() and token.isascii() and len(token) % 4 == 0


def make_table(
    kind: TokenizerKind,
    found: FolderTokens,
    extra: Mapping[str, int],
    backend: TextBackend,
    *,
    taken: Collection[str] = (),
) -> TokenTable:
    """The tokens of a folder and those that its vocabulary file has by itself.

    Args:
        kind: The tokenizer's.
        found: What the folder's files say.
        extra: Ids by name of what the vocabulary file has.
        backend: Reads it.
        taken: Those of them that SentencePiece would find in any text.

    Where a folder says how text meets such a token, that counts if transformers has a class for the vocabulary, and
    other classes fix it; its name is the folder's, where that gives another name to its id. An added token that is a
    piece of the vocabulary has the piece's id, whatever the folder says. Others follow the vocabulary in the order of
    the ids that the folder gives, without gaps, where transformers numbers them so; those of tokenizer.json have its ids.
    """

    def piece_of(name: str) -> int | None:
        index = backend.id_of(name)
        return index if index is not None and index < backend.num_pieces else None

    named = {index: name for name, index in found.ids.items()}
    own = {name: index for name, index in extra.items() if named.get(index, name) == name}
    ordinary = set(taken).difference(kind.names) if kind.has_ordinary else set()
    ordinary -= {name for name, token in found.tokens.items() if token.special}
    flagged = found.tokens if kind.has_ordinary else {}
    tokens = dict(found.tokens) | {
        name: replace(
            flagged.get(name) or AddedToken(name),
            special=name not in ordinary or _TURN_MARK.fullmatch(name) is not None,
            normalized=False,
        )
        for name in own
    }
    tokens = {
        name: replace(
            token, behind=kind.behind.get(name, ""), restarts=kind.restarts and name in found.tokens
        )
        for name, token in tokens.items()
    }
    pieces = {
        name: index for name in found.ids if name not in extra and (index := piece_of(name)) is not None
    }
    stated = {
        name: index
        for name, index in found.ids.items()
        if not kind.numbers_on or index < backend.num_pieces or name in found.in_json
    }
    known = replace(found, tokens=tokens, ids=own | stated | pieces)
    ids = known.number(piece_of, backend.num_pieces)
    listed = [index for name, index in ids.items() if name not in kind.roles.values() or name in found.ids]
    return TokenTable(tokens=tokens, ids=ids, num_tokens=1 + max([backend.num_pieces - 1, *listed]))


def _load(folder: Path, facts: TokenizerFacts, num_threads: int, *, splits_special: bool) -> TokenEncoder:
    vocabulary = find_vocabulary(folder, facts)
    if vocabulary is None:
        raise UnsupportedTokenizerError(
            f"{folder} holds none of {', '.join((*facts.vocab_files, JSON_FILE, TEKKEN_FILE))}"
        )
    if vocabulary.name == JSON_FILE:
        return open_json_encoder(
            vocabulary, facts, default_roles(folder, facts), splits_special=splits_special
        )
    kind = KINDS[class_name(folder, facts, vocabulary)]
    found = read_folder_tokens(folder, kind.roles, fixed_roles=kind.fixed_roles, rebuilt_by=kind.rebuilt_by)
    _refuse_settings(kind, found.config)
    backend, extra = kind.open(vocabulary, num_threads)
    table = make_table(kind, found, extra, backend, taken=getattr(backend, "names", ()))
    named = named_ids(facts, found.roles, table.ids, backend.id_of, config=found.config)
    spelling = replace(find_spelling(kind, found.config, folder / JSON_FILE), splits_special=splits_special)
    return TokenEncoder(backend, table, named, spelling)


def _refuse_settings(kind: TokenizerKind, config: Mapping[str, Any]) -> None:
    wrong = [key for key in ("do_lower_case",) if config.get(key)]
    if config.get("sp_model_kwargs"):
        wrong.append("sp_model_kwargs")
    if wrong:
        raise UnsupportedTokenizerError(f"tokenizer_config.json sets {', '.join(wrong)}")


def find_spelling(kind: TokenizerKind, config: Mapping[str, Any], as_json: Path) -> Spelling:
    """Where blanks are put in front: as tokenizer.json says, unless a setting has transformers convert anew."""
    if not kind.has_prefix:
        return Spelling(
            composes=kind.composes,
            marks_blanks=kind.marks_blanks,
            first_only=kind.first_only,
            even_blanks=kind.first_only,
            typed_prefix=kind.types_prefix and bool(config.get("add_prefix_space")),
            reads_signs=kind.has_ordinary,
        )
    is_legacy = config.get("legacy") is not False
    if config.get("add_prefix_space") is None and as_json.is_file():
        content = _read(as_json)
        normalizer = json.dumps(content.get("normalizer"))
        prefixed = '"Prepend"' in normalizer
        first_only = '"first"' in normalizer + json.dumps(content.get("pre_tokenizer"))
        marks_blanks = '"Replace"' in normalizer
    else:
        has_prefix, marks_blanks = config.get("add_prefix_space") is not False, is_legacy
        prefixed, first_only = has_prefix and is_legacy, has_prefix and not is_legacy
    return Spelling(
        marks_blanks=marks_blanks,
        prefixed=prefixed,
        first_only=first_only,
        unprefixed=not (prefixed or first_only),
        reads_signs=kind.has_ordinary,
    )


def _class_of(folder: Path) -> str:
    """The class that a folder names, by the name of its slow form."""
    path = folder / "tokenizer_config.json"
    name = str(_read(path).get("tokenizer_class") or "") if path.is_file() else ""
    return name if name in _JSON_CLASSES else name.removesuffix("Fast")


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except UserError as error:
        raise UnsupportedTokenizerError(str(error)) from None
