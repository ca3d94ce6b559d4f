"""Tokens beside a vocabulary, as transformers finds them in a folder: names, ids, roles, and how text meets them.

The files say the same thing in several places, and not always the same. What counts, as in
`PreTrainedTokenizerBase.from_pretrained` of transformers 4.55:

- `added_tokens_decoder` in tokenizer_config.json: ids, names and flags. Where it stands, even empty,
  special_tokens_map.json and added_tokens.json are not looked at. The added tokens of tokenizer.json count beside it,
  and of two names for one id theirs.
- otherwise special_tokens_map.json overrides the roles of tokenizer_config.json, added_tokens.json gives ids,
  and the added tokens of tokenizer.json count too.
- A token with a role is special. One without an id that is no piece of the vocabulary gets the next free id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.storage.files import read_json_object

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A name that stands for one id wherever it is met.

    Attributes:
        content: The name.
        special: Whether it is left out of decoded text, and may be kept from being met in data.
        lstrip: Whether blanks on its left belong to it.
        rstrip: The same on its right.
        single_word: Whether it is met only where no letter or digit touches it.
        normalized: Whether it is looked for after the text was normalised.
        behind: What it has to follow to be met; None where it is never met in text.
        restarts: Whether text behind it begins anew, with a blank in front where only beginnings get one.
    """

    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    behind: str | None = ""
    restarts: bool = False


@dataclass(frozen=True)
class FolderTokens:
    """What a folder's files say.

    Attributes:
        roles: Names by role ("bos_token").
        tokens: Tokens by name; those with a role among them, in the order in which ids are given.
        ids: Ids by name, as far as files give them.
        config: tokenizer_config.json.
        in_json: Those whose ids tokenizer.json gives.
    """

    roles: Mapping[str, str]
    tokens: Mapping[str, AddedToken]
    ids: Mapping[str, int]
    config: Mapping[str, Any]
    in_json: frozenset[str] = frozenset()

    def number(self, id_of: Callable[[str], int | None], num_pieces: int) -> dict[str, int]:
        """Ids of all tokens.

        Args:
            id_of: Looks a name up in the vocabulary.
            num_pieces: Size of the vocabulary without added tokens.
        """
        ids = dict(self.ids)
        for name in self.tokens:
            if name in ids:
                continue
            index = id_of(name)
            ids[name] = max([num_pieces - 1, *ids.values()]) + 1 if index is None else index
        return ids


def read_folder_tokens(
    folder: Path,
    defaults: Mapping[str, str] | None = None,
    *,
    fixed_roles: bool = False,
    rebuilt_by: str = "",
) -> FolderTokens:
    """Reads the files of a folder.

    Args:
        folder: Holds them.
        defaults: Names by role of the tokenizer's class, for roles that the files leave out.
        fixed_roles: Whether the class does not look at what files say of roles.
        rebuilt_by: A setting of tokenizer_config.json with which its class does not look at tokenizer.json.

    Raises:
        UserError: A file cannot be read.
    """
    config = _read(folder / "tokenizer_config.json")
    roles: dict[str, Any] = dict(defaults or {})
    lists: list[Any] = []
    _take_roles(config, roles, lists)
    tokens: dict[str, AddedToken] = {}
    ids: dict[str, int] = {}
    if "added_tokens_decoder" in config:
        if not rebuilt_by or config.get(rebuilt_by) is None:
            _take_json(folder / "tokenizer.json", tokens, ids)
        in_json = frozenset(ids)
        stated: dict[str, int] = {}
        _take_entries((config["added_tokens_decoder"] or {}).items(), tokens, stated)
        taken = set(ids.values())
        ids |= {name: index for name, index in stated.items() if index not in taken and name not in ids}
    else:
        _take_roles(_read(folder / "special_tokens_map.json"), roles, lists)
        special = {_name(value) for value in [*roles.values(), *lists]}
        added = _read(folder / "added_tokens.json").items()
        for name, index in sorted(added, key=lambda pair: int(pair[1])):
            tokens[name] = AddedToken(name, special=name in special, normalized=name not in special)
            ids[name] = int(index)
        listed: dict[str, int] = {}
        _take_json(folder / "tokenizer.json", tokens, listed)
        ids |= listed
        in_json = frozenset(listed)
    if fixed_roles:
        roles, lists = dict(defaults or {}), []
    for value in [*(roles[role] for role in ROLES if roles.get(role)), *lists]:
        name = _name(value)
        if name:
            tokens[name] = replace(tokens.get(name) or _token(value), special=True)
    named = {role: _name(value) for role, value in roles.items() if _name(value)}
    return FolderTokens(named, tokens, ids, config, in_json)


def _take_roles(source: Mapping[str, Any], roles: dict[str, Any], lists: list[Any]) -> None:
    for key, value in source.items():
        if key in ROLES and (_name(value) or value is None):
            if value is None:
                roles.pop(key, None)
            else:
                roles[key] = value
        elif key in _LISTS and value:
            entries = value.values() if isinstance(value, dict) else value
            lists += [entry for entry in entries if _name(entry) not in map(_name, lists)]


def _take_entries(entries: Any, tokens: dict[str, AddedToken], ids: dict[str, int]) -> None:
    for index, entry in sorted(entries, key=lambda pair: int(pair[0])):
        token = _token(entry)
        tokens[token.content] = token
        ids[token.content] = int(index)


def _take_json(path: Path, tokens: dict[str, AddedToken], ids: dict[str, int]) -> None:
    added = _read(path).get("added_tokens") or []
    _take_entries([(entry["id"], entry) for entry in added], tokens, ids)


def _token(value: Any) -> AddedToken:
    if not isinstance(value, dict):
        return AddedToken(str(value))
    special = bool(value.get("special", True))
    return AddedToken(
        str(value.get("content", "")),
        special=special,
        lstrip=bool(value.get("lstrip")),
        rstrip=bool(value.get("rstrip")),
        single_word=bool(value.get("single_word")),
        normalized=bool(value.get("normalized", not special)),
    )


def _name(value: Any) -> str:
    """A token's text; "" for what is none, such as a `null` or an empty name."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
