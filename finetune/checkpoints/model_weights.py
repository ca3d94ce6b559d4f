"""The weights of a model in a checkpoint, and the configuration beside them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from finetune.checkpoints.tensors_of_ranks import LocalTensor, family_of, local_tensor
from finetune.checkpoints.writers import TensorSet, TensorSetWriter
from finetune.models.layers import unique_tensors
from finetune.models.loading import one_process_config
from finetune.models.other_parts import has_other_parts
from finetune.processes.joint_steps import fail_on_all_ranks
from finetune.storage.code_files import keep_code
from finetune.storage.rank_files import MODEL_STEM

MODEL_FILES = TensorSet("model", MODEL_STEM, is_divided=True)


def model_weights(model: Any) -> dict[str, LocalTensor]:
    """All weights of a model, or of a stage, that a checkpoint holds; tied ones once, as the embedding.

    An output layer that PaddleNLP's files hold even then is written, too: PaddleNLP would start it at random.
    """
    family = family_of(model.config)
    ignored = set(model._keys_to_ignore_on_save or ())
    whole = {name: each for name, each in model.state_dict().items() if name not in ignored}
    copied = family.hugging_face.own_head
    state = unique_tensors(whole) | ({copied: whole[copied]} if copied in whole else {})
    return {name: local_tensor(name, state[name], model.config, family) for name in sorted(state)}


def save_model_weights(
    model: Any,
    folder: Path,
    writer: TensorSetWriter,
    *,
    whole: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Writes weights and configuration as PaddleNLP's `save_pretrained` writes them.

    Args:
        model: A model or a stage of one, without adapter.
        folder: Where to write; the same on all ranks.
        writer: How weights become files; all ranks call this.
        whole: Makes the parameters whole while they are read, for sharding stage 3.
    """
    with whole():
        writer.write(model_weights(model), folder, MODEL_FILES)
    with fail_on_all_ranks(writer.groups):
        if writer.groups.is_first:
            one_process_config(model).save_pretrained(str(folder))
            source = getattr(model, "source_folder", None)
            if source is not None and not has_other_parts(source):  # code of the whole is kept with those
                keep_code(source, folder, "config.json")
            if model.can_generate():
                model.generation_config.save_pretrained(str(folder))
