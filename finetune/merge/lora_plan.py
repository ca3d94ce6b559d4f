"""Which tensor of a base becomes which of the result: names, replacements, growth, low-rank updates.

Everything is decided from names and shapes before a weight is read; the faults of all adapters are told at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from finetune.errors import UserError, list_some
from finetune.families.family import Family
from finetune.merge import row_blocks
from finetune.merge.lora_adapters import Adapter, pissa_update
from finetune.merge.lora_base import Base, Entry, drop_output_layer, is_linear, is_table, vocabulary_axis
from finetune.merge.peft_adapters import split_joined
from finetune.models.hf_names import (
    embedding_name,
    is_output,
    is_turned,
    joined_columns,
    joined_parts,
    to_hugging_face,
)
from finetune.models.reward_head import REWARD_WEIGHT
from finetune.storage import dtypes
from finetune.storage.quantisation.scheme import QuantisationScheme
from finetune.storage.writer import ComputedTensor, Tensor, count_bytes

_MAX_LISTED = 6


def plan(
    base: Base,
    adapters: Sequence[Adapter],
    *,
    unmerge: bool = False,
    hugging_face: bool,
    scheme: QuantisationScheme | None = None,
) -> tuple[list[Tensor], int | None]:
    """The tensors to write, and the vocabulary's new size when it grows.

    Args:
        base: The model.
        adapters: Applied in this order.
        unmerge: Whether to take the adapter out instead.
        hugging_face: Whether the result bears Hugging Face's names.
        scheme: How linear layers are quantised, and dequantised again, before anything is added; None: not at all.

    Raises:
        UserError: An adapter belongs to another base; what does not fit is listed.
    """
    entries = {name: replace(entry, updates=[]) for name, entry in base.entries.items()}
    growth = None if unmerge else _find_growth(base, adapters)
    for position, adapter in enumerate(adapters):
        _check_order(adapter, position, unmerge=unmerge)
        _check_faults(adapter, base, _apply(adapter, base, entries, growth=growth))
    if REWARD_WEIGHT in entries:
        drop_output_layer(entries, base.family)
    if growth:
        _grow(base, adapters, entries, growth)
    if scheme:
        _quantise(base, adapters, entries, scheme)
    tensors: list[Tensor] = []
    for entry in entries.values():
        written = _written(entry, base, hugging_face=hugging_face, sign=-1.0 if unmerge else 1.0)
        tensors += written
        copied = base.is_tied and not hugging_face and is_table(entry.name, base.family)
        if copied and REWARD_WEIGHT not in entries and (head := base.family.hugging_face.own_head):
            tensors.append(replace(written[0], name=head))  # PaddleNLP would start the layer at random
    return tensors, growth


def _quantise(
    base: Base, adapters: Sequence[Adapter], entries: dict[str, Entry], scheme: QuantisationScheme
) -> None:
    for adapter in adapters:
        if joined := next((each for each in adapter.updates if f"{each}.weight" not in entries), None):
            raise UserError(
                f"{adapter.folder} was trained over {joined} quantised as one matrix, which the base has in parts: "
                "merge it into the original weights, without --into dequantised"
            )
    for entry in entries.values():
        if is_linear(entry, base):
            entry.scheme = scheme


def _check_order(adapter: Adapter, position: int, *, unmerge: bool) -> None:
    if unmerge and adapter.whole:
        listed = list_some(sorted(adapter.whole), _MAX_LISTED, separator=", ")
        raise UserError(
            f"--unmerge cannot take {adapter.folder} out: it replaced {listed}, whose old values are not on record. "
            "Use the base it was merged into"
        )
    if adapter.rule.dora and (unmerge or position):
        why = "--unmerge" if unmerge else "an adapter after the first"
        raise UserError(
            f"{adapter.folder} was trained with use_dora, whose lengths are those of the base's columns: it cannot be "
            f"{why}. {'Use the base it was merged into' if unmerge else 'Name it first'}"
        )
    if adapter.needs_unchanged_base and (unmerge or position):
        why = "--unmerge" if unmerge else "an adapter after the first"
        raise UserError(
            f"{adapter.folder} was trained with pissa, which starts from the singular vectors of the unchanged base: "
            f"it cannot be {why}. {'Use the base it was merged into' if unmerge else 'Name it first'}"
        )


def _apply(adapter: Adapter, base: Base, entries: dict[str, Entry], *, growth: int | None) -> list[str]:
    """Puts an adapter on the entries; what does not fit is returned."""
    faults = []
    for name, whole in adapter.whole.items():
        target = entries.get(name) or entries.get(
            embedding_name(base.family) if _may_be_tied(name, base) else ""
        )
        if target is None and name == REWARD_WEIGHT:
            entries[name] = Entry(
                name, whole.tensor, whole.is_turned, _float_type(entries, whole.tensor.dtype)
            )
            continue
        if target is None:
            faults.append(f"the base has no {name}")
            continue
        entry = Entry(target.name, whole.tensor, whole.is_turned, target.dtype)
        if not _same_but_vocabulary(entry, target, base.family):
            faults.append(f"{name} is {list(entry.shape)}, in the base {list(target.shape)}")
        entries[target.name] = entry
    for layer, update in adapter.updates.items():
        places = [(layer, update)]
        if f"{layer}.weight" not in entries and joined_parts(layer):
            places = list(split_joined(layer, update, base.adapted_config, base.family))
        for part, each in places:
            if (found := entries.get(f"{part}.weight")) is None:
                faults.append(f"the base has no {part}.weight")
                continue
            shape = _grown_shape(found, base.family, growth)
            if each.shape != shape:
                faults.append(
                    f"the update of {part} is {list(each.shape)}, its weight in the base {list(shape)}"
                )
            elif adapter.needs_unchanged_base and part != layer:
                faults.append(
                    f"pissa started from singular vectors of the joined {layer}, which the base has in parts"
                )
            elif adapter.needs_unchanged_base:
                each = pissa_update(each, adapter.rule.rank_of(layer), _reader(found))
            found.updates.append(each)
    return faults


def _float_type(entries: Mapping[str, Entry], default: np.dtype[Any]) -> np.dtype[Any]:
    """Element type of the base's weights."""
    types = (entry.dtype for entry in entries.values())
    return next((each for each in types if "float" in dtypes.dtype_name(each)), default)


def _may_be_tied(name: str, base: Base) -> bool:
    return base.is_tied and is_output(name)


def _reader(entry: Entry) -> Any:
    """Reads the weight as PaddleNLP has it."""
    return lambda: entry.tensor.load().T if entry.is_turned else entry.tensor.load()


def _same_but_vocabulary(entry: Entry, target: Entry, family: Family) -> bool:
    """Whether two shapes are equal, except for more tokens in an embedding or output layer."""
    if entry.shape == target.shape:
        return True
    axis = vocabulary_axis(target.name, family)
    if axis is None or len(entry.shape) != len(target.shape):
        return False
    sizes = list(target.shape)
    sizes[axis] = entry.shape[axis]
    return tuple(sizes) == entry.shape and entry.shape[axis] > target.shape[axis]


def _find_growth(base: Base, adapters: Sequence[Adapter]) -> int | None:
    """Rows that the embeddings grow to: tokens on record, or rows of an embedding that was trained whole."""
    table = next((entry for name, entry in base.entries.items() if is_table(name, base.family)), None)
    if table is None:
        return None
    sizes = [adapter.num_tokens or 0 for adapter in adapters]
    for adapter in adapters:
        for name, whole in adapter.whole.items():
            if is_table(name, base.family) or _may_be_tied(name, base):
                sizes.append(whole.tensor.shape[0])
    size = max(sizes, default=0)
    return size if size > table.shape[0] else None


def _grow(base: Base, adapters: Sequence[Adapter], entries: dict[str, Entry], growth: int) -> None:
    for name, entry in entries.items():
        axis = vocabulary_axis(name, base.family)
        if axis is None or entry.shape[axis] >= growth:
            continue
        theirs = next((adapter for adapter in adapters if adapter.is_peft), None)
        if theirs:
            raise UserError(
                f"{theirs.path} was trained with {growth} embeddings but holds no {name} of that size, and what peft "
                "gave the new tokens there is not on record: train it with modules_to_save for both layers"
            )
        entry.size = growth


def _grown_shape(entry: Entry, family: Family, growth: int | None) -> tuple[int, ...]:
    axis, sizes = vocabulary_axis(entry.name, family), list(entry.shape)
    if growth is not None and axis is not None:
        sizes[axis] = growth
    return tuple(sizes)


def _check_faults(adapter: Adapter, base: Base, faults: list[str]) -> None:
    if not faults:
        if not adapter.updates and not adapter.whole:
            raise UserError(f"{adapter.path} holds no tensors: copy the adapter again")
        return
    trained_on = adapter.config.get("base_model_name_or_path")
    named = f"It was trained on {trained_on}: give that" if trained_on else "Give the model it was trained on"
    raise UserError(
        f"the adapter {adapter.path} does not fit the base {base.folder}: {list_some(faults, _MAX_LISTED)}. "
        f"{named} with --model_name_or_path"
    )


def _written(entry: Entry, base: Base, *, hugging_face: bool, sign: float) -> list[Tensor]:
    """The entry as it is written; several tensors where a joined layer is taken apart for Hugging Face."""
    layer, _, ending = entry.name.rpartition(".")
    turned = hugging_face and is_turned(entry.name, entry.shape, base.family, tied=base.is_tied)
    parts = joined_parts(layer) if hugging_face else ()
    if entry.updates and "float" not in dtypes.dtype_name(entry.dtype):
        raise UserError(
            f"{entry.tensor.parts[0].path}: {entry.name} has element type {entry.dtype}: a quantised base cannot take "
            "an adapter up. Give the model it was quantised from"
        )
    is_changed = (
        entry.updates
        or entry.scheme
        or entry.size
        or turned != entry.is_turned
        or entry.tensor.dtype != entry.dtype
    )
    if not parts and not is_changed:
        return [replace(entry.tensor, name=_out_name(entry.name, base, hugging_face))]
    rows = row_blocks.stored_rows(entry.tensor)
    if not parts:
        rows = _changed(entry, rows, turned=turned, sign=sign, family=base.family)
        return [replace(rows, name=_out_name(entry.name, base, hugging_face))]
    rows = _changed(entry, rows, turned=False, sign=sign, family=base.family)
    columns = joined_columns(layer, rows.shape[-1], base.adapted_config, base.family)
    written: list[Tensor] = []
    for part, chosen in zip(parts, columns, strict=True):
        some = row_blocks.chosen_columns(rows, chosen)
        some = row_blocks.turned_rows(some) if turned else some
        written.append(replace(some, name=_out_name(f"{part}.{ending}", base, hugging_face)))
    return written


def _changed(
    entry: Entry, rows: ComputedTensor, *, turned: bool, sign: float, family: Family
) -> ComputedTensor:
    """The rows in the form of the result, quantised and back, grown and updated."""
    if entry.scheme:
        rows = row_blocks.quantised_rows(rows, entry.scheme, is_turned=entry.is_turned)
    if turned != entry.is_turned:
        rows = row_blocks.turned_rows(rows)
    rows = row_blocks.converted_rows(rows, entry.dtype)
    if entry.size is not None:
        along_rows = turned or vocabulary_axis(entry.name, family) == 0
        rows = (row_blocks.grown_rows if along_rows else row_blocks.grown_columns)(rows, entry.size)
    if entry.updates:
        updates = [update.turned() if turned else update for update in entry.updates]
        if updates[0].lengths:
            rows = row_blocks.scaled_rows(rows, updates.pop(0))
        if updates:
            rows = row_blocks.updated_rows(rows, updates, sign=sign)
    return rows


def _out_name(name: str, base: Base, hugging_face: bool) -> str:
    return to_hugging_face(name, base.family) if hugging_face else name


def dtype_name(tensors: Sequence[Tensor]) -> str:
    """Element type that most bytes have, as configurations name it."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        name = dtypes.dtype_name(tensor.dtype)
        sizes[name] = sizes.get(name, 0) + count_bytes(tensor)
    return max((name for name in sizes if "float" in name), key=lambda name: sizes[name], default="float32")
