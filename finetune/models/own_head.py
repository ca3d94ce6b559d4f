"""Whether an output layer that stands in the files beside the embedding is another tensor.

PaddleNLP's OPT has an output layer of its own whatever its configuration says: in files that it converted the layer
equals the embedding, in files that it trained it does not, and the configuration of both reads alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.families.family import Family
from finetune.models.hf_names import embedding_name, is_tied
from finetune.storage.joined_tensors import JoinedTensor
from finetune.storage.quantisation.stored_tensors import PackedTensor


def with_own_head(
    config: Mapping[str, Any], tensors: Mapping[str, JoinedTensor], family: Family
) -> dict[str, Any]:
    """The configuration, with `tie_word_embeddings` false where the files hold another output layer.

    Args:
        config: config.json as found.
        tensors: Of the model's files, by their names.
        family: Its record.
    """
    head, table = (tensors.get(name) for name in (family.hugging_face.own_head, embedding_name(family)))
    if head is None or table is None or _equal(head, table):
        return dict(config)
    return {**config, "tie_word_embeddings": False}


def refuse_packed_copy(
    config: Mapping[str, Any], tensors: Mapping[str, JoinedTensor], family: Family, folder: object
) -> None:
    """Refuses an output layer that is packed although it is the embedding: its values are no longer those.

    Args:
        config: config.json as found.
        tensors: Of the model's files, by their names, packed ones as one.
        family: Its record. Where the files decide whether there is a layer of its own, they do here, too.
        folder: For messages.

    Raises:
        UserError: There is such a layer.
    """
    if family.hugging_face.own_head or not is_tied(config, family):
        return
    end = f"{family.head_module}.weight"
    if head := next(
        (name for name, each in tensors.items() if name.endswith(end) and isinstance(each, PackedTensor)),
        None,
    ):
        raise UserError(
            f"model {folder}: {head} is quantised, while config.json says that the output layer is the embedding, which is "
            "not: set tie_word_embeddings to false in config.json if the model is to answer with the quantised layer, or "
            "give the model that it was made from"
        )


def _equal(head: JoinedTensor, table: JoinedTensor) -> bool:
    if head.shape != table.shape or head.dtype != table.dtype:
        return False
    # As bits: numbers that are none would differ from themselves.
    ours, theirs = (np.ascontiguousarray(each.read()).view(np.uint8) for each in (head, table))
    step = 2**22
    flat = ours.reshape(-1), theirs.reshape(-1)
    return all(
        np.array_equal(flat[0][begin : begin + step], flat[1][begin : begin + step])
        for begin in range(0, len(flat[0]), step)
    )
