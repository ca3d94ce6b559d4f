"""Bases and adapters of a merge that were given, or are named by an adapter, by names on hubs."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import UserError
from finetune.machine.screen import print_text
from finetune.merge.source import locate_base
from finetune.models.hubs.adapters import is_hub_name, name_of
from finetune.models.hubs.repository import cached_model
from finetune.models.resolve import resolve_model, with_weights


def local_base(given: Path) -> Path:
    """Folder of the base that the command line names; from a hub's cache or a hub where no such place is here.

    Raises:
        UserError: No hub has it, or its weights cannot be read here.
    """
    return _download(name_of(given)) if is_hub_name(given) else given


def named_base_folder(name: str, adapter: Path) -> Path:
    """The same for the base that an adapter's configuration names, which may be relative to the adapter's place.

    Raises:
        UserError: It is neither here nor on a hub.
    """
    found = locate_base(name, adapter)
    if found.is_dir() or not is_hub_name(name):
        return found
    if folder := cached_model(name):
        return folder
    try:
        return _download(name)
    except UserError as error:
        raise UserError(
            f"the base that {adapter} names, {name}, is no folder here and cannot be downloaded: give the base's folder "
            f"with --model_name_or_path. {error}"
        ) from None


def _download(name: str) -> Path:
    resolved = resolve_model(name)
    if resolved.remote is not None:
        print_text(f"downloading the base {resolved.remote}")
    folder = with_weights(resolved).folder
    assert folder is not None
    return folder
