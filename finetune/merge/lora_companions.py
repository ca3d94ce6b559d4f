"""The files beside the weights of a model that adapters were merged into: configuration, tokenizer, chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.adapters.adapter_folder import recorded_padding
from finetune.checkpoints import companions
from finetune.data.templates.trained_template import carry_template, drop_template, template_source
from finetune.families.multimodal.text_part import text_part
from finetune.merge import hf_out
from finetune.merge.lora_adapters import Adapter
from finetune.merge.lora_base import Base
from finetune.merge.lora_plan import dtype_name
from finetune.merge.tokenizer_files import copy_tokenizer
from finetune.models.hf_names import is_tied, paddle_config
from finetune.models.other_parts import copy_files_of_others, write_other_parts
from finetune.models.reward_head import REWARD_WEIGHT, is_reward_config, reward_config
from finetune.storage.code_files import with_present_code
from finetune.storage.files import read_json_if_present
from finetune.storage.writer import Tensor


def write_companions(
    base: Base,
    adapters: Sequence[Adapter],
    folder: Path,
    *,
    hugging_face: bool,
    num_tokens: int | None,
    tensors: Sequence[Tensor],
    unmerge: bool,
) -> None:
    """Configuration from the base, tokenizer from the last adapter that has one, else from the base."""
    companions.copy_companions(base.folder, folder)
    for adapter in adapters:
        copy_tokenizer(adapter.folder, folder)
    _note_template(base, adapters, folder, unmerge=unmerge)
    path, dtype = folder / "config.json", dtype_name(tensors)
    config = text_part(read_json_if_present(path))
    if base.is_tied != is_tied(config, base.family):  # the files say otherwise
        config["tie_word_embeddings"] = base.is_tied
    if num_tokens:
        config = hf_out.with_vocabulary(config, num_tokens)
    if any(REWARD_WEIGHT in adapter.whole for adapter in adapters) and not is_reward_config(config):
        config = reward_config(config, base.family) | recorded_padding(adapters[-1].folder)
    copy_files_of_others(base.folder, folder)
    if base.is_hugging_face and base.other_parts and not hugging_face:
        write_other_parts(base.other_parts, folder)
    if base.is_hugging_face and not hugging_face:
        config = paddle_config(config, base.family, dtype=dtype)
    elif hugging_face:
        config = with_present_code(config, folder)
    hf_out.write_config(path, config)
    if hugging_face and not base.is_hugging_face:
        hf_out.write_hugging_face_files(folder, base.family, dtype=dtype)
    elif hugging_face:
        hf_out.write_tokenizer_files(folder, base.family)


def _note_template(base: Base, adapters: Sequence[Adapter], folder: Path, *, unmerge: bool) -> None:
    """The chat template of the training, the last adapter's first; without the adapters nothing is known of it."""
    if unmerge:
        written, source = folder / hf_out.TEMPLATE_FILE, template_source(folder, base.family.tokenizer)
        if source and written.is_file() and written.read_text(encoding="utf-8") == source:
            written.unlink()
        drop_template(folder)
    else:
        carry_template([*(adapter.folder for adapter in reversed(adapters)), base.folder], folder)
