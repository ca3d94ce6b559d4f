"""What a multimodal folder holds beside its text part: kept byte for byte, and put back where the whole is written.

A run trains the text part, and its result is a model of text alone in PaddleNLP's form. Beside that stand the other
parts' tensors, under the names that they had, and the configuration of the whole (`OTHER_PARTS`, `WHOLE_CONFIG`). What
writes Hugging Face's form makes the whole folder out of both again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.family import Family
from finetune.families.multimodal.kinds import MultimodalKind, find_kind
from finetune.families.multimodal.tensor_layout import WRAPPED, TensorLayout, find_layout
from finetune.families.multimodal.text_part import text_part, with_text_fields
from finetune.storage.checkpoints import TensorFiles, check_weights, find_shards
from finetune.storage.files import read_json_if_present, read_json_object, write_json
from finetune.storage.joined_tensors import JoinedTensor
from finetune.storage.quantisation.stored_format import without_format
from finetune.storage.writer import Layout, Tensor, write_tensors

OTHER_PARTS = "other_parts"
"""Stem of the files that hold the other parts' tensors beside a text part."""
WHOLE_CONFIG = "whole_config.json"
"""Configuration of the whole model, and how its tensors are called, beside a text part."""


_OF_QUANTISED = (
    ".absmax",
    ".SCB",
    ".qweight",
    ".qzeros",
    ".scales",
    ".weight_packed",
    ".weight_scale",
    ".weight_shape",
)


@dataclass(frozen=True)
class OtherParts:
    """What is not the text part of a multimodal model.

    Attributes:
        config: config.json of the whole.
        kind: Its kind.
        layout: How its folder calls the tensors of the text part.
        tensors: Those of the other parts, under the folder's names.
    """

    config: Mapping[str, Any]
    kind: MultimodalKind
    layout: TensorLayout
    tensors: tuple[JoinedTensor, ...]

    def whole_config(self, *, num_tokens: int, tied: bool, dtype: str) -> dict[str, Any]:
        """config.json of the whole, with what the training changed in its text part.

        Args:
            num_tokens: Rows of its embedding.
            tied: Whether its output layer is its embedding.
            dtype: Element type of its weights.
        """
        text = text_part(self.config)
        sizes = ("vocab_size", "padded_vocab_size")
        changed: dict[str, Any] = {
            name: num_tokens for name in sizes if name in text and text[name] != num_tokens
        }
        if "tie_word_embeddings" in text and bool(text["tie_word_embeddings"]) != tied:
            changed["tie_word_embeddings"] = tied
        field = "dtype" if "dtype" in text else "torch_dtype"
        if text.get(field) != dtype:
            changed[field] = dtype
        return with_text_fields(without_format(self.config), changed)

    def find_quantised(self) -> str | None:
        """Name of a tensor that says how a layer of another part is quantised; None where all weights are ordinary ones."""
        return next((tensor.name for tensor in self.tensors if tensor.name.endswith(_OF_QUANTISED)), None)

    def record_in_whole(self, family: Family) -> Family:
        """The record of the text part, whose layers are called as those of the whole model are."""
        form = family.hugging_face
        head = f"{self.kind.head_prefix}{form.head}"
        return replace(family, hugging_face=replace(form, prefix=self.kind.layer_prefix, head=head))

    def whole_tensors(self, text: Iterable[Tensor]) -> list[Tensor]:
        """All tensors of the whole folder.

        Args:
            text: Those of the text part, under Hugging Face's names in a folder of text alone.
        """
        renamed = [replace(tensor, name=self.layout.folder_name(tensor.name)) for tensor in text]
        return [*renamed, *self.tensors]


def find_multimodal_kind(folder: Path) -> MultimodalKind | None:
    """The kind of a folder that holds a whole multimodal model; None for any other."""
    return find_kind(read_json_if_present(folder / "config.json"))


def take_text_part(
    folder: Path, tensors: Mapping[str, JoinedTensor]
) -> tuple[dict[str, JoinedTensor], OtherParts | None]:
    """Divides the tensors of a folder.

    Args:
        folder: Of a model, multimodal or not.
        tensors: All of its tensors by name.

    Returns:
        The text part's under the names that they have in a folder of text alone, and the other parts; None where the
        folder holds nothing else.

    Raises:
        UserError: There is no text part in a multimodal folder.
    """
    config = read_json_if_present(folder / "config.json")
    if (kind := find_kind(config)) is None:
        return dict(tensors), read_other_parts(folder)
    layout = find_layout(tensors, kind.flat)
    text = {}
    others = []
    for name, tensor in tensors.items():
        if layout and (own := layout.text_name(name)) is not None:
            text[own] = replace(tensor, name=own)
        else:
            others.append(tensor)
    if layout is None or not text:
        raise UserError(
            f"model {folder} is of {kind.name} by its config.json, but its weights hold no text part under a name that is "
            "known: copy the folder again"
        )
    return text, OtherParts(config, kind, layout, tuple(others))


def read_other_parts(folder: Path) -> OtherParts | None:
    """The other parts that stand beside a text part, or for a checkpoint of a run beside its result; None where none are.

    Raises:
        UserError: Files of them are missing or damaged.
    """
    folder = _place_of_others(folder)
    path = folder / WHOLE_CONFIG
    if not path.is_file():
        return None
    noted = read_json_object(path, keys=("config", "text_part"))
    kind = find_kind(noted["config"]) if isinstance(noted["config"], dict) else None
    layouts = {each.outer: each for each in known_layouts(kind)} if kind else {}
    if kind is None or noted["text_part"] not in layouts:
        raise UserError(f"{path} is of no multimodal model that is known here: copy it again")
    tensors = _stored_tensors(folder)
    return OtherParts(noted["config"], kind, layouts[noted["text_part"]], tuple(tensors))


def _place_of_others(folder: Path) -> Path:
    """Where other parts stand: for a checkpoint of a run in the folder of its result."""
    is_checkpoint = folder.name.startswith("checkpoint-") and (folder.parent / WHOLE_CONFIG).is_file()
    return folder.parent if is_checkpoint else folder


def known_layouts(kind: MultimodalKind) -> list[TensorLayout]:
    """All layouts that folders of a kind may have."""
    return [*WRAPPED, *([kind.flat] if kind.flat else [])]


def _stored_tensors(folder: Path) -> Iterable[JoinedTensor]:
    index = folder / f"{OTHER_PARTS}.safetensors.index.json"
    start = index if index.is_file() else folder / f"{OTHER_PARTS}.safetensors"
    if not start.is_file():
        raise UserError(
            f"{folder} holds the text part of a multimodal model ({WHOLE_CONFIG}), but {start.name} is missing: copy it "
            f"there, or remove {WHOLE_CONFIG} to use the text part alone"
        )
    return TensorFiles(find_shards(start)).tensors.values()


def keep_other_parts(base: Path, folder: Path) -> None:
    """Puts the other parts of a base beside the text part that was trained; nothing where it has none.

    Args:
        base: Folder of the model that the training started from.
        folder: Of the result.

    Raises:
        UserError: Files of them are missing or damaged.
    """
    if find_multimodal_kind(base) is None:
        parts = read_other_parts(base)
    else:
        parts = take_text_part(base, TensorFiles(find_shards(check_weights(base))).tensors)[1]
    if parts is not None:
        write_other_parts(parts, folder)
        copy_files_of_others(base, folder)


def write_other_parts(parts: OtherParts, folder: Path) -> None:
    """Writes them beside a text part."""
    write_tensors(folder, parts.tensors, Layout(OTHER_PARTS, format="pt"))
    write_json(folder / WHOLE_CONFIG, {"config": dict(parts.config), "text_part": parts.layout.outer})


def drop_other_parts(folder: Path) -> None:
    """Takes what `write_other_parts` wrote out of a folder that holds the whole."""
    for path in [folder / WHOLE_CONFIG, *folder.glob(f"{OTHER_PARTS}*")]:
        path.unlink(missing_ok=True)


def has_other_parts(folder: Path) -> bool:
    """Whether a folder is of a multimodal model, whole or as a text part beside the others."""
    return (folder / WHOLE_CONFIG).is_file() or find_multimodal_kind(folder) is not None


def copy_files_of_others(source: Path, folder: Path) -> None:
    """Copies settings and code of other parts, which say how images and sounds become numbers; without any, nothing."""
    source = _place_of_others(source)
    if not has_other_parts(source):
        return
    for pattern in ("*processor_config.json", "*.py"):
        for path in source.glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
