"""Weights and optimizer state in one file per tensor- and pipeline-parallel rank, read as those of one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError, list_some
from finetune.families.family import Family
from finetune.families.tensor_splits import find_split
from finetune.models.other_parts import find_multimodal_kind, take_text_part
from finetune.models.own_head import refuse_packed_copy
from finetune.storage.checkpoints import Checkpoint, ShardedCheckpoint, TensorFiles, has_weights
from finetune.storage.dtypes import BFLOAT16, dtype_name
from finetune.storage.quantisation.stored_format import stored_format
from finetune.storage.quantisation.stored_tensors import PackedTensor, with_packed
from finetune.storage.rank_files import MODEL_STEM, find_rank_files

_MAX_LISTED = 5


def open_shards(
    folder: Path, *, stem: str = MODEL_STEM, ending: str = ".pdparams", family: Family, config: Any
) -> ShardedCheckpoint:
    """Opens a folder's shards of any degrees; nothing but names and shapes is read.

    Args:
        folder: Holds the shards.
        stem: First part of the file names: `MODEL_STEM`, `LORA_STEM`, `PREFIX_STEM` or that of other files.
        ending: Last part.
        family: Record of the model.
        config: Configuration of the base model as the family adapts it.

    Raises:
        UserError: No shards, one missing, damaged or of another run.
    """
    files = find_rank_files(folder, stem, ending)
    if files is None:
        raise UserError(f"{folder} holds no {stem}*{ending}")
    return ShardedCheckpoint(files, lambda name: find_split(family, name, config, degree=files.tensor_degree))


def is_sharded(folder: Path) -> bool:
    """Whether the folder's weights are in one file per rank, and in no other form.

    Raises:
        UserError: A rank's file is missing.
    """
    return not has_weights(folder) and find_rank_files(folder, MODEL_STEM) is not None


def open_checkpoint(folder: Path, family: Family, config: Mapping[str, Any]) -> TensorFiles:
    """Opens a folder's weights, whole tensors or the parts that several ranks wrote; packed ones as one tensor a layer.

    Of a multimodal model the text part's alone, as a folder of it alone would name them.

    Args:
        folder: Of the model.
        family: Record of the model.
        config: Its config.json.

    Raises:
        UserError: There are none, or files are missing or damaged.
    """
    form = stored_format(config, folder)
    if is_sharded(folder):
        if form:
            raise UserError(
                f"model {folder} is quantised ({form.label}) in one file per rank, which is not read here: give the "
                "folder of the model that it was made from"
            )
        return open_shards(folder, family=family, config=family.adapt_config(dict(config)))
    checkpoint = Checkpoint(folder)
    if find_multimodal_kind(folder):
        checkpoint.tensors = take_text_part(folder, checkpoint.tensors)[0]
    if form:
        checkpoint.tensors = with_packed(checkpoint.tensors, form, folder)
        refuse_packed_copy(family.adapt_config(dict(config)), checkpoint.tensors, family, folder)
    else:
        _refuse_whole_numbers(checkpoint, folder)
    return checkpoint


def _refuse_whole_numbers(checkpoint: Checkpoint, folder: Path) -> None:
    """Raises UserError where weights are codes of a quantisation that config.json says nothing of."""
    coded = [
        f"{name} ({dtype_name(tensor.dtype)})"
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(".weight") and tensor.dtype.kind != "f" and tensor.dtype != BFLOAT16
    ]
    if coded:
        raise UserError(
            f"model {folder}: weights are whole numbers, as of a quantised model, but config.json has no quantization_config "
            f"that says what they stand for ({len(coded)}): {list_some(sorted(coded), _MAX_LISTED)}. Copy its config.json "
            "again, or give the folder of the model that it was made from"
        )


def check_packed(folder: Path, family: Family, config: Mapping[str, Any]) -> None:
    """Reads the names of a quantised folder's tensors and its first packed layer, to tell early what cannot be read.

    Args:
        folder: Of the model; without weights nothing is read.
        family: Record of the model.
        config: Its config.json.

    Raises:
        UserError: Layers lack tensors, or the first one does not fit together or contradicts its configuration.
    """
    if has_weights(folder):
        tensors = open_checkpoint(folder, family, config).tensors
        next(each for each in tensors.values() if isinstance(each, PackedTensor)).read_packed()
