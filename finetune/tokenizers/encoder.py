"""One small face for every PaddleNLP tokenizer: text to ids and back, and the ids that frame a prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.families.family import Family, import_object
from finetune.families.special_tokens import padding_token, token_id
from finetune.machine.stand_ins import replaced
from finetune.models import hub
from finetune.models.hubs.hugging_face import is_offline
from finetune.models.hubs.repository import cached_model, fetch_small_files, find_remote
from finetune.storage.files import open_file, read_json_if_present, read_json_or_empty

if TYPE_CHECKING:
    from finetune.families.text_backends import Ids
    from finetune.tokenizers.fast_encoder import FastEncoder

_TEMPLATE_FILE = "chat_template.json"
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", _TEMPLATE_FILE)
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")
_PROBES = ("a b", " a", "上衣 12", "</s> <s>", "\n\n x\t", "e\u0301")


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
        family = family or _family_of(folder)
        tokenizer = _load_from_folder(folder, family)
    else:
        tokenizer = _load_by_name(name)
    # Asking for an unset `pad_token` would log an error.
    if family is not None and "pad_token" not in tokenizer.special_tokens_map:
        tokenizer.pad_token = token_text(tokenizer, family.tokenizer.pad_fallback)
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
    found = tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(text))
    return text == (found.decode(errors="replace") if isinstance(found, bytes) else found)


def token_text(tokenizer: Any, name: str) -> str:
    """Text of a token given by role or by its text."""
    return str(tokenizer.convert_ids_to_tokens(token_id(tokenizer, name)))


class FamilyEncoder:
    """What data preparation and generation need of a tokenizer.

    Text is data: a sample that contains "</s>" gets the pieces of these four characters, never the id
    that ends an answer, so that no sample can close its own answer or open a new turn. (PaddleNLP's
    tokenizer turns such text into the special id, and drops the blanks around it.) Every other text
    gives exactly PaddleNLP's ids with `add_special_tokens=False`. In a text that contains a special
    token, added ordinary tokens (added_tokens.json) are split into pieces too.

    Args:
        tokenizer: PaddleNLP's.
        family: The model's.
        fast: The fast tokenizer of the same folder; it serves where many texts are encoded together, once
            it has given the same ids for a few probes.

    Attributes:
        fast: The fast tokenizer in use, or None.
        eos_token_id: Id that ends an answer.
        pad_token_id: Id that fills rows.
        prefix_ids: Ids that open every sequence.
        chat_end_ids: Further ids at which generation stops.
    """

    def __init__(self, tokenizer: Any, family: Family, fast: FastEncoder | None = None):
        facts = family.tokenizer
        self.tokenizer = tokenizer
        self.eos_token_id: int = token_id(tokenizer, facts.end_of_answer)
        self.pad_token_id: int = token_id(tokenizer, padding_token(tokenizer, facts))
        self.prefix_ids: tuple[int, ...] = tuple(token_id(tokenizer, name) for name in facts.prefix)
        self.chat_end_ids: tuple[int, ...] = tuple(
            token_id(tokenizer, name) for name in facts.chat_ends if has_token(tokenizer, name)
        )
        special_ids = {int(index) for index in tokenizer.all_special_ids if index is not None}
        framing = {self.eos_token_id, self.pad_token_id, *self.prefix_ids, *self.chat_end_ids}
        self._skipped = special_ids | framing
        special = sorted((str(token) for token in tokenizer.all_special_tokens), key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, special))) if special else None
        agrees = fast is not None and all(fast.encode(text) == self.encode(text) for text in _PROBES)
        self.fast = fast if agrees else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special token added or recognised."""
        if not text:
            return []
        literal = self._special_text is not None and self._special_text.search(text) is not None
        # The second switch is that of the tiktoken kind; each kind ignores the other's.
        tokens = self.tokenizer.tokenize(text, split_special_tokens=literal, allowed_special=set())
        return list(self.tokenizer.convert_tokens_to_ids(tokens))

    def encode_many(self, texts: Sequence[str]) -> Sequence[Ids]:
        """Ids of each text, the same as from `encode`; on several threads where there is a fast tokenizer."""
        return self.fast.encode_many(texts) if self.fast else [self.encode(text) for text in texts]

    def encode_special(self, text: str) -> list[int]:
        """Ids of a template's own text, in which the names of special tokens stand for them."""
        return list(self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(text))) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without the special tokens; blanks are left as the ids have them."""
        kept = [int(index) for index in ids if int(index) not in self._skipped]
        if not kept:
            return ""
        text: str = self.tokenizer.convert_tokens_to_string(self.tokenizer.convert_ids_to_tokens(kept))
        return text


def _family_of(folder: Path) -> Family | None:
    from finetune.families.config_file import read_config
    from finetune.families.family import find_family

    return find_family(read_config(folder)) if (folder / "config.json").is_file() else None


def _load_from_folder(folder: Path, family: Family | None) -> Any:
    if family is None:
        return _load_by_name(str(folder))
    overrides = _vocab_file(folder, family)
    _check_files(folder)
    if (folder / "tokenizer_config.json").is_file() and not family.tokenizer.own_class:
        return _load_by_name(str(folder), **overrides)
    return _load_by_name(str(folder), tokenizer_class=family.tokenizer.tokenizer_class, **overrides)


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


def _vocab_file(folder: Path, family: Family) -> dict[str, str]:
    """Names the vocabulary where it lies under another name than the one PaddleNLP looks for."""
    names = family.tokenizer.vocab_files
    present = [name for name in names if (folder / name).is_file()]
    if not present:
        raise UserError(_missing_vocabulary(folder, family))
    return {} if present[0] == names[0] else {"vocab_file": str(folder / present[0])}


def _missing_vocabulary(folder: Path, family: Family) -> str:
    """Which file to add; a tokenizer.json alone makes people believe that nothing is missing."""
    names = family.tokenizer.vocab_files
    if not (folder / "tokenizer.json").is_file():
        return f"folder {folder} holds no tokenizer: put one of {', '.join(names)} there"
    found = [path for name in names if (path := folder / "original" / name).is_file()]
    place = f"copy {found[0]} there" if found else "published models keep it beside tokenizer.json"
    if "tokenizer.model" in names:
        # The one published layout that keeps the file elsewhere and names a class PaddleNLP does not have.
        place += (
            "" if found else " or, as Llama 3 does, in original/tokenizer.model"
        ) + '; Llama 3 also needs "tokenizer_class": "Llama3Tokenizer" in tokenizer_config.json'
    return (
        f"folder {folder} holds tokenizer.json, but PaddleNLP does not read it for family {family.name}: "
        f"put one of {', '.join(names)} there ({place})"
    )
