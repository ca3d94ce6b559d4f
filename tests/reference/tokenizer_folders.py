"""Folders of tokenizers as people have them: which files there are, and files that disagree with one another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.models.tiny.checkpoint import build_tiny
from tests.families.cases import FACTS
from tests.reference.published_tokenizers import KINDS, make_published, with_user_defined
from tests.reference.tokenizer_definitions import open_sentencepiece
from tests.reference.tokenizer_parity import FLAGS, NO_PREFIX

VOCABULARIES = ("tokenizer.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt")
USER_DEFINED = (
    *("<table>", "two\u2581words", "\n", "\u2581\u2581", "\u2581\u2581\u2581", "<sep>", "\u2581lead", "trail\u2581"),
    *("<|im_end|>", "a<sep>", "茶茶", "\t\t"),
)  # fmt: skip
"""Pieces of a vocabulary that transformers makes added tokens of."""


def make_model(family: str, folder: Path) -> Path:
    """A tiny model of a family, with the tokenizer of the published form where there is one."""
    if family in KINDS:
        return make_published(family, folder)
    build_tiny(family, folder)
    if not FACTS[family].blank_in_front:
        path = folder / "tokenizer.model"
        path.write_bytes(path.read_bytes() + NO_PREFIX)
    return folder


def add_user_defined(folder: Path) -> dict[str, int]:
    """Makes pieces of a SentencePiece vocabulary user-defined, and gives their ids."""
    for path in folder.glob("*.model"):
        content = with_user_defined(path.read_bytes(), USER_DEFINED)
        path.write_bytes(content)
    processor = open_sentencepiece(content)
    edit(folder / "config.json", vocab_size=processor.get_piece_size())
    return {name: processor.piece_to_id(name) for name in USER_DEFINED}


def edit(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file."""
    path.write_text(json.dumps(_read(path) | fields, ensure_ascii=False), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def entry(name: str, **flags: bool) -> dict[str, Any]:
    """An added token as files have it."""
    return {"content": name, **FLAGS, **flags}


def add_to_decoder(folder: Path, entries: dict[int, dict[str, Any]]) -> None:
    """Adds tokens to `added_tokens_decoder`."""
    path = folder / "tokenizer_config.json"
    found = _read(path).get("added_tokens_decoder") or {}
    edit(path, added_tokens_decoder=found | {str(index): each for index, each in entries.items()})


def write_json(folder: Path) -> int:
    """Writes tokenizer.json as transformers makes it of the folder, and gives the number of tokens."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return len(tokenizer)


def _json_alone(folder: Path) -> int:
    size = write_json(folder)
    for name in VOCABULARIES:
        (folder / name).unlink(missing_ok=True)
    return size


def _json_with_tokens(folder: Path) -> int:
    """Tokens that only tokenizer.json has."""
    size = write_json(folder)
    path = folder / "tokenizer.json"
    added = _read(path)["added_tokens"]
    more = [
        {"id": size, **entry("<injson>")},
        {"id": size + 1, **entry("<alsojson>", special=True, lstrip=True)},
    ]
    edit(path, added_tokens=[*added, *more])
    return size


def _disagreeing(folder: Path) -> None:
    """One id with two names, and a token with other flags."""
    size = _json_with_tokens(folder)
    flags = entry("<alsojson>", rstrip=True, special=True)
    add_to_decoder(folder, {size: entry("<indec>"), size + 1: flags, size + 2: entry("<spec>", special=True)})


def _disagreeing_alone(folder: Path) -> None:
    _disagreeing(folder)
    for name in VOCABULARIES:
        (folder / name).unlink(missing_ok=True)


def _gap(folder: Path) -> None:
    """An id that does not follow the vocabulary."""
    import transformers

    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    add_to_decoder(folder, {size + 5: entry("<gap>"), size + 3: entry("<indec>", rstrip=True)})


def _map_without_decoder(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    kept = {key: value for key, value in _read(path).items() if key != "added_tokens_decoder"}
    path.write_text(json.dumps(kept))
    edit(folder / "special_tokens_map.json", additional_special_tokens=["<ex>"])


def _setting(make: Callable[[Path], Any] = lambda folder: None, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        make(folder)
        edit(folder / "tokenizer_config.json", **fields)

    return change


CHANGES: dict[str, Callable[[Path], Any]] = {
    "only tokenizer.json": _json_alone,
    "only tokenizer.json, general class": _setting(_json_alone, tokenizer_class="PreTrainedTokenizerFast"),
    "both": write_json,
    "tokens of tokenizer.json": _json_with_tokens,
    "both, disagreeing": _disagreeing,
    "only tokenizer.json, disagreeing": _disagreeing_alone,
    "ids with a gap": _gap,
    "special_tokens_map.json": _map_without_decoder,
    "extra_special_tokens": _setting(extra_special_tokens={"image_token": "<ex>"}),
    "additional_special_tokens": _setting(additional_special_tokens=["<ex>"]),
    "legacy false beside tokenizer.json": _setting(write_json, legacy=False),
    "legacy true": _setting(legacy=True),
    "add_prefix_space": _setting(add_prefix_space=True),
    "no add_prefix_space": _setting(add_prefix_space=False),
    "add_prefix_space, both": _setting(write_json, add_prefix_space=True),
    "clean_up_tokenization_spaces": _setting(clean_up_tokenization_spaces=True),
    "no add_bos_token": _setting(add_bos_token=False),
}
"""What is done to a model's folder."""
