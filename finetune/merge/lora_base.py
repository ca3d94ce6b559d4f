"""The model that adapters are merged into: its tensors under PaddleNLP's names, whatever its files call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.families.family import Family, find_family
from finetune.families.multimodal.text_part import text_part
from finetune.merge.row_blocks import AnyUpdate
from finetune.merge.source import MODEL, open_source
from finetune.models.hf_names import (
    embedding_name,
    is_hugging_face,
    is_output,
    is_tied,
    is_turned,
    joined_parts,
    to_paddle,
)
from finetune.models.other_parts import OtherParts, take_text_part
from finetune.models.own_head import refuse_packed_copy, with_own_head
from finetune.models.reward_head import REWARD_WEIGHT
from finetune.storage.dtypes import array_dtype
from finetune.storage.files import read_json_if_present
from finetune.storage.joined_tensors import JoinedTensor
from finetune.storage.quantisation.scheme import QuantisationScheme
from finetune.storage.quantisation.side_files import with_side_facts
from finetune.storage.quantisation.stored_format import StoredFormat, stored_format
from finetune.storage.quantisation.stored_tensors import PackedTensor, with_packed


@dataclass
class Entry:
    """One tensor of the result.

    Attributes:
        name: PaddleNLP's name.
        tensor: Where its values come from, before updates.
        is_turned: Whether it is stored there as the transpose of PaddleNLP's form.
        dtype: Element type in the result.
        updates: What is added, in PaddleNLP's form.
        size: Rows (or columns, for an output layer) it grows to; None when it does not.
        scheme: How its values are quantised, and dequantised again, before updates; None: they are not.
    """

    name: str
    tensor: JoinedTensor
    is_turned: bool
    dtype: np.dtype[Any]
    updates: list[AnyUpdate] = field(default_factory=list)
    size: int | None = None
    scheme: QuantisationScheme | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """In PaddleNLP's form, before growth."""
        return self.tensor.shape[::-1] if self.is_turned else self.tensor.shape


@dataclass(frozen=True)
class Base:
    """The model that adapters are merged into.

    Attributes:
        folder: Its folder.
        config: config.json as found.
        family: Its record.
        entries: Its tensors by PaddleNLP's names.
        is_hugging_face: Whether its files bear Hugging Face's names.
        is_tied: Whether its output layer is its embedding.
        other_parts: Of a multimodal model, of which the rest is the text part.
    """

    folder: Path
    config: Mapping[str, Any]
    family: Family
    entries: Mapping[str, Entry]
    is_hugging_face: bool
    is_tied: bool
    other_parts: OtherParts | None = None

    @property
    def stored_format(self) -> StoredFormat | None:
        """How its files are quantised; None where they are not."""
        return stored_format(self.config, self.folder)

    @property
    def adapted_config(self) -> dict[str, Any]:
        """The configuration as the family adapts it."""
        return self.family.adapt_config(dict(self.config))

    def num_inputs(self, layer: str) -> int:
        """Rows of the weight of a layer, or of the parts of a joined one; 0 where there is none."""
        names = (f"{each}.weight" for each in (layer, *joined_parts(layer)))
        shapes = (self.entries[name].shape for name in names if name in self.entries)
        return next((shape[0] for shape in shapes), 0)


def open_base(folder: Path) -> Base:
    """Finds a base's tensors; a copy of a tied embedding is left out.

    Raises:
        UserError: It is no model, or its weights are incomplete, or quantised in a way that is not read here.
    """
    config = read_json_if_present(folder / "config.json")
    if not config:
        raise UserError(
            f"the base {folder} is no model folder: it has no config.json. Check --model_name_or_path"
        )
    config = with_side_facts(text_part(config), folder)
    family = find_family(config, folder)
    source = open_source(folder, prefers_whole=True)
    if source.kind != MODEL:
        raise UserError(
            f"the base {folder} holds an adapter and no model: give the model with --model_name_or_path"
        )
    by_name, other_parts = take_text_part(folder, {tensor.name: tensor for tensor in source.tensors()})
    if form := stored_format(config, folder):
        by_name = with_packed(by_name, form, folder)
        refuse_packed_copy(config, by_name, family, folder)
    base = base_of(folder, config, family, list(by_name.values()))
    return replace(base, other_parts=other_parts)


def base_of(folder: Path, config: Mapping[str, Any], family: Family, tensors: Sequence[JoinedTensor]) -> Base:
    """A base from its tensors, under PaddleNLP's names or Hugging Face's."""
    is_theirs = is_hugging_face((tensor.name for tensor in tensors), family)
    config = with_own_head(config, {tensor.name: tensor for tensor in tensors}, family)
    tied = is_tied(config, family)
    entries: dict[str, Entry] = {}
    for tensor in tensors:
        name = to_paddle(tensor.name, family) if is_theirs else tensor.name
        turned = is_theirs and is_turned(name, tensor.shape, family, tied=tied)
        entries[name] = Entry(name, tensor, turned, _result_dtype(tensor))
    if tied:
        _drop_copies(entries, family)
    return Base(folder, config, family, entries, is_theirs, tied)


def _result_dtype(tensor: JoinedTensor) -> np.dtype[Any]:
    """A packed weight without an element type of its own gets that of the model's other weights."""
    if isinstance(tensor, PackedTensor) and tensor.dtype == np.float32:
        return array_dtype(tensor.form.dtype)
    return tensor.dtype


def is_linear(entry: Entry, base: Base) -> bool:
    """Whether a tensor is the weight of a linear layer other than the output layer."""
    turns = is_turned(entry.name, entry.shape, base.family, tied=base.is_tied)
    return turns and not is_output(entry.name) and entry.name != REWARD_WEIGHT


def linear_layers(base: Base) -> list[str]:
    """Names of the layers whose weights `is_linear` names."""
    return [name.removesuffix(".weight") for name, entry in base.entries.items() if is_linear(entry, base)]


def is_table(name: str, family: Family) -> bool:
    """Whether a tensor is the embedding of the tokens."""
    return name == embedding_name(family)


def vocabulary_axis(name: str, family: Family) -> int | None:
    """The axis of tokens in an embedding or output layer; None for other tensors."""
    if is_table(name, family) or name == family.hugging_face.own_head:
        return 0
    return -1 if name.endswith(f"{family.head_module}.weight") else None


def drop_output_layer(entries: dict[str, Entry], family: Family) -> None:
    """Takes out what a reward head stands in the place of."""
    for name in [each for each in entries if is_output(each) or family.head_module in each.split(".")]:
        del entries[name]


def _drop_copies(entries: dict[str, Entry], family: Family) -> None:
    heads = [name for name in entries if is_output(name)]
    if any(is_table(name, family) for name in entries):
        for name in heads:
            del entries[name]
    elif heads:  # stored under the output layer's name alone
        table = embedding_name(family)
        entry = entries.pop(heads[0])
        entries[table] = replace(entry, name=table, is_turned=False)
