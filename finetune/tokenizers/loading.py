"""PaddleNLP's tokenizers, loaded from a folder or by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.family import Family, TokenizerFacts, import_object
from finetune.families.special_tokens import token_id
from finetune.families.tekken import TEKKEN_FILE, TEKKEN_ROLES
from finetune.families.text_backends import UnsupportedTokenizerError
from finetune.machine.stand_ins import replaced
from finetune.models import hub
from finetune.models.hubs.hugging_face import is_offline
from finetune.models.hubs.repository import cached_model, fetch_small_files, find_remote
from finetune.storage.files import open_file, read_json_if_present, read_json_or_empty
from finetune.storage.lfs_pointers import refuse_pointers
from finetune.tokenizers.added_tokens import read_folder_tokens
from finetune.tokenizers.fast_encoder import JSON_FILE, class_name, default_roles, find_vocabulary

_TEMPLATE_FILE = "chat_template.json"
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", _TEMPLATE_FILE)
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", TEKKEN_FILE)
SOURCE_FOLDER = "source_folder"
"""Attribute of a loaded tokenizer: the folder whose files it was read from."""


def load_tokenizer(folder_or_name: str | Path, family: Family | None = None) -> Any:
    """Loads a PaddleNLP tokenizer; sets the family's padding token when the tokenizer names none.

    Args:
        folder_or_name: Folder with the tokenizer's files, or a name on the hub. A folder never touches
            the network.
        family: Record of the model; taken from the folder's config.json when not given.

    Raises:
        UserError: The folder lacks vocabulary files, or the files cannot be read.
    """
    name, path = str(folder_or_name), Path(folder_or_name)
    folder = path if path.is_dir() else hub.cached_folder(name) or _folder_of_name(name)
    if folder is not None:
        refuse_pointers(folder)
        family = family or _family_of(folder)
        tokenizer = _load_from_folder(folder, family)
        setattr(tokenizer, SOURCE_FOLDER, folder)
    else:
        tokenizer = _load_by_name(name)
    # Asking for an unset `pad_token` would log an error.
    if family is not None and "pad_token" not in tokenizer.special_tokens_map:
        tokenizer.pad_token = _padding_text(tokenizer, family.tokenizer)
    return tokenizer


def _folder_of_name(name: str) -> Path | None:
    """Folder of the files, from a cache or a hub other than PaddleNLP's; None where that may have it.

    Raises:
        UserError: No hub has it.
    """
    if folder := cached_model(name, needs_weights=False):
        return folder
    reasons = []
    if "://" not in name and not is_offline():
        if hub.is_reachable() and hub.has_model(name):
            return None
        reasons = [f"PaddleNLP's hub ({hub.endpoint()}) does not have it or cannot be reached"]
    repository, others = find_remote(name)
    if repository is None:
        raise hub.absence(name, [*reasons, *others])
    return fetch_small_files(repository)


def has_token(tokenizer: Any, text: str) -> bool:
    """Whether the text is a token of its own; tokenizers give another token's id where it is not."""
    index = tokenizer.convert_tokens_to_ids(text)
    found = None if index is None else tokenizer.convert_ids_to_tokens(index)
    return text == (found.decode(errors="replace") if isinstance(found, bytes) else found)


def _padding_text(tokenizer: Any, facts: TokenizerFacts) -> str:
    """The family's stand-in for a padding token, or the end token of a vocabulary that lacks it."""
    name = facts.pad_fallback
    is_there = name in ("bos", "eos", "pad", "unk") or has_token(tokenizer, name)
    return token_text(tokenizer, name if is_there else facts.end_of_answer)


def token_text(tokenizer: Any, name: str) -> str:
    """Text of a token given by role or by its text."""
    return str(tokenizer.convert_ids_to_tokens(token_id(tokenizer, name)))


def _family_of(folder: Path) -> Family | None:
    from finetune.families.config_file import read_config
    from finetune.families.family import find_family

    return find_family(read_config(folder), folder) if (folder / "config.json").is_file() else None


def _load_from_folder(folder: Path, family: Family | None) -> Any:
    if family is None:
        return _load_by_name(str(folder))
    facts = family.tokenizer
    vocabulary = find_vocabulary(folder, facts)
    if vocabulary is None:
        raise UserError(f"folder {folder} holds no tokenizer: put one of {_names(facts.vocab_files)} there")
    _check_files(folder)
    is_plain = facts.tokenizer_class.endswith(".JsonTokenizer")  # not one of a family with roles of its own
    if vocabulary.name == JSON_FILE and (is_plain or facts.vocab_files[0] != JSON_FILE):
        return _load_json(vocabulary, facts)
    if vocabulary.name == TEKKEN_FILE:
        return _load_tekken(vocabulary)
    overrides = {} if vocabulary.name == facts.vocab_files[0] else {"vocab_file": str(vocabulary)}
    name = class_name(folder, facts, vocabulary)
    is_own = facts.own_class or name == facts.tokenizer_class.rpartition(".")[2]
    path = facts.tokenizer_class if is_own else f"paddlenlp.transformers.{name}"
    return _load_by_name(str(folder), tokenizer_class=path, **overrides)


def _load_json(path: Path, facts: TokenizerFacts) -> Any:
    from finetune.families.json_tokenizer import JsonTokenizer

    roles = read_folder_tokens(path.parent, default_roles(path.parent, facts)).roles
    try:
        return JsonTokenizer(str(path), **roles)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def _load_tekken(path: Path) -> Any:
    from finetune.families.tekken_tokenizer import TekkenTokenizer

    try:
        return TekkenTokenizer(str(path), **TEKKEN_ROLES | dict(read_folder_tokens(path.parent).roles))
    except UnsupportedTokenizerError as error:
        raise UserError(
            f"the tokenizer of {path.parent} cannot be read: {error}. Copy tekken.json again, or put the tokenizer.json "
            "of the same model there"
        ) from None


def _names(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys((*names, JSON_FILE, TEKKEN_FILE)))


def _load_by_name(
    name: str, tokenizer_class: str = "paddlenlp.transformers.AutoTokenizer", **overrides: str
) -> Any:
    try:
        with _templates_left_alone():
            tokenizer = import_object(tokenizer_class).from_pretrained(name, **overrides)
    except UserError:
        raise
    except Exception as error:  # PaddleNLP raises anything from AssertionError to TypeError here
        raise UserError(
            f"the tokenizer of {name} cannot be read ({type(error).__name__}: {error})"
        ) from error
    if not tokenizer:
        raise UserError(f"the vocabulary file of {name} cannot be read: copy the tokenizer files again")
    return tokenizer


@contextmanager
def _templates_left_alone() -> Iterator[None]:
    """Jinja text stays where it is, in the settings that are saved; a file of PaddleNLP's kind is kept to be saved."""
    from paddlenlp.transformers.tokenizer_utils import ChatTemplateMixin

    original = ChatTemplateMixin.init_chat_template

    def keep_parts(tokenizer: Any, chat_template: Any) -> None:
        is_file = isinstance(chat_template, str) and chat_template.endswith(_TEMPLATE_FILE)
        if is_file and "conversation" in read_json_or_empty(chat_template):
            original(tokenizer, chat_template)

    with replaced(ChatTemplateMixin, "init_chat_template", keep_parts):
        yield


def _check_files(folder: Path) -> None:
    """What PaddleNLP would wait for, or fail over without a word on the file."""
    for name in _SETTINGS_FILES:
        read_json_if_present(folder / name)
    for path in sorted(folder.iterdir()):
        if path.name in _VOCABULARY_FILES or path.is_fifo() or path.is_char_device():
            open_file(path).close()
