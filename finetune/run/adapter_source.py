"""Where the adapter that a run starts from lies: a folder, or a name on a hub, which is downloaded first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.models.hubs.adapters import is_hub_name, local_adapter
from finetune.settings.quantisation import BLOCK_SIZE_FIELDS, check_quantisation, resolve_quantisation

if TYPE_CHECKING:
    from finetune.settings.arguments import Arguments


def fetch_adapter(args: Arguments) -> list[str]:
    """Downloads the adapter that a run starts from, where it is the name of one on a hub.

    Returns:
        Lines for the person: see `resolve_quantisation`, which could not look into it before.

    Raises:
        UserError: No hub has it, or the base that it was trained over contradicts the settings.
    """
    model = args.model
    name = model.lora_path if model.lora else None
    if not name or not is_hub_name(name):
        adapter_folder(args)
        return []
    folder = local_adapter(name)
    values = vars(args.quant) | vars(args.model) | {"lora_path": str(folder)}
    notes = resolve_quantisation(values)
    if faults := [fault for _, fault in check_quantisation(values)]:
        raise UserError(faults)
    for field in ("weight_quantize_algo", "weight_double_quant", *BLOCK_SIZE_FIELDS):
        setattr(model, field, values[field])
    return notes


def adapter_folder(args: Arguments) -> Path | None:
    """The saved adapter that the run starts from, if it does; from a hub's cache where it was given by name."""
    model = args.model
    if model.lora and model.lora_path:
        return local_adapter(model.lora_path)
    return (
        local_adapter(model.prefix_path, "prefix_path") if model.prefix_tuning and model.prefix_path else None
    )
