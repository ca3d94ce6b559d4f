"""One small face for every PaddleNLP tokenizer: text to ids and back, and the ids that frame a prompt."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.families.family import Family
from finetune.families.special_tokens import token_id
from finetune.families.text_backends import TextBackend, UnsupportedTokenizerError, unprefixed_processor
from finetune.families.tokenizer_kinds import TokenizerKind, find_kind
from finetune.storage.files import read_json_object, read_json_or_empty
from finetune.tokenizers.added_tokens import FolderTokens, read_folder_tokens
from finetune.tokenizers.fast_encoder import JSON_FILE, find_spelling, load_fast_encoder, make_table
from finetune.tokenizers.loading import SOURCE_FOLDER, has_token, load_tokenizer
from finetune.tokenizers.token_encoder import Spelling, TokenEncoder, named_ids

if TYPE_CHECKING:
    from finetune.families.text_backends import Ids


def load_encoder(
    folder_or_name: str | Path,
    family: Family,
    *,
    models: Iterable[Path | None] = (),
    splits_special: bool = True,
) -> FamilyEncoder:
    """Loads a tokenizer as training, evaluation, answering and export use it.

    Args:
        folder_or_name: Folder with the tokenizer's files, or a name on the hub.
        family: Record of the model.
        models: Folders whose generation_config.json may name further ids at which answers end.
        splits_special: Whether names of special tokens in data are plain text.

    Raises:
        UserError: The folder lacks vocabulary files, or the files cannot be read.
    """
    tokenizer = load_tokenizer(folder_or_name, family)
    folder = getattr(tokenizer, SOURCE_FOLDER, None)
    fast, reason = None, "its files are not known"
    if folder is not None:
        fast, reason = load_fast_encoder(folder, family, splits_special=splits_special)
    encoder = FamilyEncoder(tokenizer, family, fast, splits_special=splits_special)
    encoder.slow_because = "" if fast else reason
    encoder.add_end_ids(end_ids(folder for folder in (folder, *models) if folder is not None))
    return encoder


def end_ids(folders: Iterable[Path]) -> tuple[int, ...]:
    """The ids that the files of some folders name as ends of answers.

    They stand in generation_config.json. In a folder without it those count that config.json lists, as in transformers;
    a single one there is left alone, since tools leave the default of a class there, which may be an ordinary token.

    Raises:
        UserError: `eos_token_id` there is neither a number nor a list of numbers.
    """
    found: dict[int, None] = {}
    for folder in folders:
        path = folder / "generation_config.json"
        is_stated = path.is_file()
        path = path if is_stated else folder / "config.json"
        value = (read_json_object if is_stated else read_json_or_empty)(path).get("eos_token_id")
        listed = value if isinstance(value, list) else [value] if is_stated and value is not None else []
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in listed):
            raise UserError(f"{path}: eos_token_id must be a number or a list of numbers, not {value!r}")
        found |= dict.fromkeys(listed)
    return tuple(found)


class FamilyEncoder:
    """What data preparation and generation need of a tokenizer.

    Args:
        tokenizer: PaddleNLP's.
        family: The model's.
        fast: The tokenizer of the same folder without Paddle, which then gives all ids; without it PaddleNLP's
            spells the text, one after the other, between the tokens that the folder's files name.
        splits_special: Whether names of special tokens in data are plain text; without `fast`.

    Attributes:
        fast: The tokenizer in use that is not PaddleNLP's, or None.
        slow_because: Why there is none, where that was found out.
        eos_token_id: Id that ends an answer.
        pad_token_id: Id that fills rows.
        prefix_ids: Ids that open every sequence.
        chat_end_ids: Further ids at which generation stops.
        answer_prefix_ids: Ids between a prompt and its answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        family: Family,
        fast: TokenEncoder | None = None,
        *,
        splits_special: bool = True,
    ):
        self.tokenizer, self.fast = tokenizer, fast
        self.slow_because = ""
        self._encoder = fast or _paddle_encoder(tokenizer, family, splits_special=splits_special)
        named = self._encoder.named
        self.eos_token_id, self.pad_token_id = named.eos, named.pad
        self.prefix_ids, self.chat_end_ids = named.prefix, named.chat_ends
        self.answer_prefix_ids = named.answer_prefix
        self.marks_inner_text = self._encoder.marks_inner_text
        self.splits_special = self._encoder.splits_special

    @property
    def num_tokens(self) -> int:
        """How many embeddings the tokenizer needs: PaddleNLP's does not know the tokens of every file."""
        return max(len(self.tokenizer), self._encoder.num_tokens)

    def add_end_ids(self, ids: Iterable[int]) -> None:
        """Ids at which generation stops as well."""
        own = (self.eos_token_id, *self.chat_end_ids)
        self.chat_end_ids += tuple(index for index in dict.fromkeys(ids) if index not in own)

    def encode(self, text: str, *, inner: bool = False) -> list[int]:
        """Ids of a text that is data, see `TokenEncoder`."""
        return self._encoder.encode(text, inner=inner)

    def encode_many(self, texts: Sequence[str], *, inner: bool = False) -> Sequence[Ids]:
        """Ids of each text, the same as from `encode`; on several threads where there is a fast tokenizer."""
        return self._encoder.encode_many(texts, inner=inner)

    def encode_special(self, text: str, *, inner: bool = False) -> list[int]:
        """Ids of a template's own text, in which the names of special tokens stand for them."""
        return self._encoder.encode_special(text, inner=inner)

    def names_special(self, text: str) -> bool:
        """Whether a text spells the name of a special token."""
        return self._encoder.names_special(text)

    def blanks_beside(self, name: str) -> tuple[bool, bool]:
        """Whether the blanks on the left and on the right of a token belong to it."""
        return self._encoder.blanks_beside(name)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without the special tokens; blanks are left as the ids have them."""
        return self._encoder.decode(ids)


class _PaddleBackend:
    """PaddleNLP's tokenizer as one that spells plain text.

    Args:
        tokenizer: The tokenizer.
        has_prefix: Whether it puts a blank in front of texts, by a SentencePiece model that it reads.
    """

    def __init__(self, tokenizer: Any, *, has_prefix: bool = False):
        self._tokenizer, self._has_prefix = tokenizer, has_prefix
        self.num_pieces = int(tokenizer.vocab_size)

    @functools.cached_property
    def _unprefixed(self) -> Any:
        """The SentencePiece model without the blank that it puts in front of texts."""
        return unprefixed_processor(self._tokenizer.sp_model.serialized_model_proto())

    def encode_many(self, texts: Sequence[str], *, inner: bool = False) -> list[Ids]:
        """The ids of each text."""
        if inner and self._has_prefix:
            spelled = self._unprefixed.encode(list(texts), out_type=str)
            return [list(self._tokenizer.convert_tokens_to_ids(found)) for found in spelled]
        # Two switches for two kinds of tokenizers; each ignores the other's.
        pieces = [
            self._tokenizer.tokenize(text, split_special_tokens=True, allowed_special=set()) for text in texts
        ]
        return [list(self._tokenizer.convert_tokens_to_ids(found)) for found in pieces]

    def id_of(self, token: str) -> int | None:
        """The id of a piece by its text."""
        return int(token_id(self._tokenizer, token)) if has_token(self._tokenizer, token) else None

    def decode(self, ids: Sequence[int], *, inner: bool = False) -> str:
        """The text of ids."""
        pieces = self._tokenizer.convert_ids_to_tokens(list(ids))
        if inner and self._has_prefix:
            return str(self._unprefixed.decode(list(map(str, pieces))))
        return str(self._tokenizer.convert_tokens_to_string(pieces))

    def piece(self, index: int) -> str:
        """One token, for people to read."""
        found = self._tokenizer.convert_ids_to_tokens(index)
        return found.decode(errors="replace") if isinstance(found, bytes) else str(found)


def _paddle_encoder(tokenizer: Any, family: Family, *, splits_special: bool) -> TokenEncoder:
    """PaddleNLP's tokenizer with the tokens that the files of its folder name."""
    facts, kind = family.tokenizer, find_kind(tokenizer) or TokenizerKind(open=_not_opened)
    backend = _PaddleBackend(tokenizer, has_prefix=kind.has_prefix or kind.first_only)
    # Of the tokens that PaddleNLP added by itself the folder's files tell more.
    folder = getattr(tokenizer, SOURCE_FOLDER, None)
    special = {
        str(name): index
        for name in (*tokenizer.all_special_tokens, *kind.names)
        if (index := backend.id_of(str(name))) is not None and (folder is None or index < backend.num_pieces)
    }
    special |= getattr(tokenizer, "special_ids", {})  # those of a rank file
    if kind.types_prefix:
        tokenizer.add_prefix_space = False  # it comes before names are looked for
    taken: tuple[str, ...] = ()
    if kind.take_names is not None and hasattr(tokenizer, "sp_model"):
        content, names = kind.take_names(Path(tokenizer.vocab_file))
        tokenizer.sp_model.LoadFromSerializedProto(content)
        special |= {
            str(tokenizer.sp_model.id_to_piece(index)): index
            for index in range(tokenizer.sp_model.get_piece_size())
            if tokenizer.sp_model.is_control(index)
        }
        special |= names
        taken = tuple(names)
    roles = {f"{role}_token": value for role, value in _roles_of(tokenizer).items()}
    if folder is not None:
        found = read_folder_tokens(
            folder, kind.roles or roles, fixed_roles=kind.fixed_roles, rebuilt_by=kind.rebuilt_by
        )
    else:
        found = FolderTokens(roles, {}, {}, {})
    table = make_table(kind, found, special, backend, taken=taken)
    try:
        named = named_ids(facts, found.roles, table.ids, backend.id_of, config=found.config)
        spelling = find_spelling(kind, found.config, folder / JSON_FILE) if folder else Spelling()
    except UnsupportedTokenizerError as error:
        raise UserError(f"{error}: check tokenizer_config.json in its folder") from None
    return TokenEncoder(backend, table, named, replace(spelling, splits_special=splits_special))


def _not_opened(path: Path, num_threads: int) -> tuple[TextBackend, dict[str, int]]:
    raise UnsupportedTokenizerError(f"{path} is not read here")


def _roles_of(tokenizer: Any) -> dict[str, str]:
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    known = tokenizer.special_tokens_map
    return {name: str(known[f"{name}_token"]) for name in names if known.get(f"{name}_token")}
