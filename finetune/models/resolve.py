"""From a folder or a name to what is known of a model before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.config_fields import unknown_fields, unread_fields
from finetune.families.config_file import read_config
from finetune.families.family import Family, find_family
from finetune.families.multimodal.kinds import MultimodalKind
from finetune.families.registry import find_candidates, foreign_classes
from finetune.models import hub
from finetune.models.hubs.hugging_face import is_offline
from finetune.models.hubs.repository import (
    Repository,
    cached_model,
    fetch_description,
    fetch_small_files,
    fetch_weights,
    find_remote,
)
from finetune.models.other_parts import find_multimodal_kind
from finetune.models.own_head import with_own_head
from finetune.models.shard_files import is_sharded, open_checkpoint
from finetune.storage.checkpoints import check_weights
from finetune.storage.files import read_json_if_present
from finetune.storage.lfs_pointers import refuse_pointers
from finetune.storage.quantisation.scheme import QuantisationScheme
from finetune.storage.quantisation.stored_format import StoredFormat, stored_format

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is known to be there.

    Attributes:
        folder: Local folder with config, tokenizer and weights; None for a name on PaddleNLP's hub, all of which
            comes on loading.
        name: As the user gave it.
        config: config.json as found.
        family: The record that covers it.
        remote: Where weights that are not in the folder yet come from on loading.
        kind: Of a multimodal model, whose text part alone is used; `config` is that part's.
    """

    folder: Path | None
    name: str
    config: dict[str, Any]
    family: Family
    remote: Repository | None = None
    kind: MultimodalKind | None = None

    @property
    def notes(self) -> list[str]:
        """Warnings of what config.json says and nothing reads, of a class of another family, and that a part of the model alone is used."""
        unread = foreign_classes(self.config, self.family) + unread_fields(self.config, self.family)
        if self.kind is None:
            return unread
        return [f"note: {self.name} is multimodal ({self.kind.name}): its text part alone is used", *unread]

    @property
    def stored_format(self) -> StoredFormat | None:
        """How its files are quantised; None where they are not."""
        return stored_format(self.config, self.name)


def resolve_model(
    name_or_path: str | Path, *, needs_weights: bool = True, text_only: bool = True
) -> ResolvedModel:
    """Finds a model; a local folder causes no network traffic, and neither does one in a hub's cache.

    Args:
        name_or_path: Its folder, or its name on the hub.
        needs_weights: Whether a folder without weights is a fault.
        text_only: Whether the text part of a multimodal model will do.

    Raises:
        UserError: No model folder, no weights, a family that is not covered, or a name while the hub
            cannot be reached.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if path.is_file():
        raise UserError(f"model {name} is a file: give the folder that holds config.json and the weights")
    if not path.is_dir() and "://" not in name and _looks_like_path(name):
        raise UserError(f"model folder {name} does not exist: check --model_name_or_path")
    folder = path if path.is_dir() else hub.cached_folder(name) or cached_model(name)
    if folder is None:
        return _resolve_remote(name, text_only=text_only)
    refuse_pointers(folder)
    kind = _find_kind(folder, name, text_only=text_only)
    config = read_config(folder)
    family = _covered(config, name, folder)
    stored_format(config, folder)  # one that is not read is refused by name, before any weight is read
    read_json_if_present(folder / GENERATION_CONFIG)  # a fault of it is told before any weight is read
    if needs_weights and not is_sharded(folder):
        check_weights(folder)
    if needs_weights:
        config = _with_own_head(folder, family, config)
    return ResolvedModel(folder, name, config, family, kind=kind)


def _find_kind(folder: Path, name: str, *, text_only: bool) -> MultimodalKind | None:
    """The kind of a multimodal model.

    Raises:
        UserError: It is one, and more than its text part is wanted.
    """
    kind = find_multimodal_kind(folder)
    if kind and not kind.refusal and not text_only:
        raise UserError(
            f"model {name} is multimodal ({kind.name}), and images or sounds are not trained on here: set text_only to "
            "true to train its text part and to keep the others as they are, or give a model of text alone"
        )
    return kind


def _resolve_remote(name: str, *, text_only: bool) -> ResolvedModel:
    """Looks a name up on the hubs: PaddleNLP's first, then the others; downloads all but the weights.

    The configuration comes alone, so that a model that is not covered costs nothing more.
    """
    reasons = []
    if "://" not in name and not is_offline():
        if not hub.is_reachable():
            reasons.append(f"PaddleNLP's hub ({hub.endpoint()}) cannot be reached")
        elif hub.has_model(name):
            folder = hub.download_config(name)
            kind = _find_kind(folder, name, text_only=text_only)
            config = read_config(folder)
            stored_format(config, name)
            return ResolvedModel(None, name, config, _covered(config, name, None), kind=kind)
        else:
            reasons.append(f"PaddleNLP's hub ({hub.endpoint()}) has no model of that name")
    repository, others = find_remote(name)
    if repository is None:
        raise hub.absence(name, [*reasons, *others] or ["it is no name that a hub could have"])
    repository, folder = fetch_description(repository)
    kind = _find_kind(folder, name, text_only=text_only)
    config = read_config(folder)
    _check_covered(config, name)
    stored_format(config, name)
    folder = fetch_small_files(repository)
    return ResolvedModel(folder, name, config, _covered(config, name, folder), repository, kind)


def with_weights(resolved: ResolvedModel) -> ResolvedModel:
    """The model with its weights in its folder: those of a hub's are downloaded now.

    Raises:
        UserError: They cannot be had, or in no form that is read here.
    """
    if resolved.folder is not None and resolved.remote is None:
        return resolved
    folder = fetch_weights(resolved.remote) if resolved.remote else hub.download(resolved.name)
    config = _with_own_head(folder, resolved.family, resolved.config)
    return replace(resolved, folder=folder, config=config, remote=None)


def _with_own_head(folder: Path, family: Family, config: dict[str, Any]) -> dict[str, Any]:
    if not family.hugging_face.own_head:
        return config
    return with_own_head(config, open_checkpoint(folder, family, config).tensors, family)


def _covered(config: dict[str, Any], name: str, folder: Path | None) -> Family:
    try:
        family = find_family(config, folder)
    except UserError as error:
        raise UserError(f"model {name} is not supported: {error}") from None
    if faults := [f"model {name}: {fault}" for fault in unknown_fields(config, family)]:
        raise UserError(faults)
    return family


def _check_covered(config: dict[str, Any], name: str) -> None:
    """Refuses a model that no family covers; which of several does may depend on files that are not there yet."""
    try:
        find_candidates(config)
    except UserError as error:
        raise UserError(f"model {name} is not supported: {error}") from None


def quantised_twice(resolved: ResolvedModel) -> UserError:
    """What to tell where the weights of a quantised folder are to be quantised."""
    assert resolved.stored_format is not None
    return UserError(
        f"model {resolved.name} is quantised already ({resolved.stored_format.label}), and weight_quantize_algo would "
        "quantise it once more: leave weight_quantize_algo out, or give the model that it was made from"
    )


def trained_over_another(
    resolved: ResolvedModel, adapter: object, scheme: QuantisationScheme, *, remedy: str | None = None
) -> UserError:
    """What to tell where an adapter's record says that its base was quantised otherwise than the folder is.

    Args:
        resolved: The model.
        adapter: The adapter's folder.
        scheme: How its base was quantised.
        remedy: What to set to use the adapter over this model all the same; None: that cannot be done.
    """
    assert resolved.stored_format is not None
    return UserError(
        f"the adapter in {adapter} was trained over a base in {scheme.label}, and model {resolved.name} is quantised "
        f"already ({resolved.stored_format.label}): give the model that the adapter was trained over"
        f"{f', or {remedy} to use it over this one' if remedy else ''}"
    )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or name.endswith("/")
