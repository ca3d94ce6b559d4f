"""What a folder needs beside the tensors' names and shapes for Hugging Face's transformers to load it.

config.json is written in transformers' fields. Files of the tokenizer are copied as they are, under the name that
transformers looks for; only in tokenizer_config.json the class is renamed and what PaddleNLP noted for itself left out.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.templates.own_templates import keep_named
from finetune.data.templates.trained_template import template_source
from finetune.errors import UserError
from finetune.families.config_fields import without_class_defaults
from finetune.families.family import Family, find_family
from finetune.families.multimodal.text_part import text_part
from finetune.models.hf_names import embedding_name, is_tied, says_tied, to_hugging_face
from finetune.models.other_parts import drop_other_parts, take_text_part
from finetune.models.reward_head import REWARD_WEIGHT, is_reward_config, with_reward_class
from finetune.storage.code_files import AUTO_MAP, with_present_code
from finetune.storage.files import read_json_if_present, write_json
from finetune.storage.joined_tensors import JoinedTensor
from finetune.storage.quantisation.stored_format import without_format
from finetune.storage.writer import Tensor

if TYPE_CHECKING:
    from finetune.merge.lora_base import Base

# What PaddleNLP notes of itself, of how a model was laid out and of its kernels; nothing of the model.
_OWN_FIELDS = (
    "dpo_config", "dtype", "fuse_", "immediate_clear_past_key_value", "long_sequence_", "paddlenlp_version",
    "pipeline_parallel_degree", "recompute", "rope_scaling_factor", "rope_scaling_type", "sep_parallel_degree",
    "sequence_parallel", "tensor_parallel_", "use_flash_attention", "use_last_token_for_generation",
    "use_long_sequence_strategies", "use_recompute", "virtual_pp_degree", "context_parallel_degree",
    "quantization_config_",
)  # fmt: skip
_DISTANCES = "alibi"
# PaddleNLP's name of a tokenizer's class -> transformers'.
_TOKENIZER_CLASSES = {
    "GPTTokenizer": "GPT2Tokenizer",
    "BloomTokenizer": "BloomTokenizerFast",
    "ChatGLMv2Tokenizer": "ChatGLMTokenizer",
    "JsonTokenizer": "PreTrainedTokenizerFast",
}
# PaddleNLP's notes on where a tokenizer came from; with "from_slow" transformers refuses a tokenizer.json.
_TOKENIZER_NOTES = ("from_slow", "_from_auto", "name_or_path", "special_tokens_map_file")
TEMPLATE_FILE = "chat_template.jinja"
_SENTENCEPIECE, _THEIR_SENTENCEPIECE = "sentencepiece.bpe.model", "tokenizer.model"


def convert(tensors: Sequence[JoinedTensor], folder: Path, source: Path) -> Sequence[Tensor]:
    """Gives a merged model Hugging Face's form.

    Args:
        tensors: All tensors of the model under PaddleNLP's names.
        folder: The result's, with the files of configuration and tokenizer in it.
        source: The folder that the tensors are of.

    Returns:
        The tensors to write.

    Raises:
        UserError: It holds an adapter, or a model that transformers cannot express.
    """
    from finetune.merge.lora_base import base_of
    from finetune.merge.lora_plan import dtype_name, plan

    config = read_json_if_present(folder / "config.json")
    if not config:
        raise UserError(
            "--save_format hf writes whole models; for an adapter use merge_lora_params.py --save_format peft"
        )
    text, other_parts = take_text_part(source, {tensor.name: tensor for tensor in tensors})
    config = text_part(config)
    family = find_family(config, folder)
    base = replace(base_of(folder, config, family, list(text.values())), other_parts=other_parts)
    written, _ = plan(base, [], hugging_face=True)
    if other_parts:
        write_tokenizer_files(folder, family)
        return write_whole(base, written, folder)
    if base.is_tied != is_tied(config, family):  # the files say otherwise
        write_json(folder / "config.json", config | {"tie_word_embeddings": base.is_tied})
    write_hugging_face_files(folder, family, dtype=dtype_name(written))
    return written


def write_whole(base: Base, text: Sequence[Tensor], folder: Path) -> list[Tensor]:
    """Gives a merged multimodal model the configuration of the whole.

    Args:
        base: Its text part before the merge, and the other parts.
        text: Tensors of the text part in Hugging Face's form.
        folder: The result's.

    Returns:
        The tensors of the whole.

    Raises:
        UserError: It is a reward model, which transformers does not have with other parts, or other parts are quantised.
    """
    from finetune.merge.lora_plan import dtype_name

    parts = base.other_parts
    assert parts is not None
    if any(tensor.name == REWARD_WEIGHT for tensor in text):
        raise UserError(
            f"{base.folder} is a reward model on the text part of a multimodal model ({parts.kind.name}), which "
            "transformers cannot load as a whole: use --save_format paddle"
        )
    if name := parts.find_quantised():
        raise UserError(
            f"{base.folder} holds {name}: another part than the text is quantised, and a merged model has ordinary weights "
            "only. Give the model that it was made from, or write the adapter alone (--save_format peft)"
        )
    table = to_hugging_face(embedding_name(base.family), base.family)
    num_tokens = next(tensor.shape[0] for tensor in text if tensor.name == table)
    drop_other_parts(folder)
    write_json(
        folder / "config.json",
        parts.whole_config(num_tokens=num_tokens, tied=base.is_tied, dtype=dtype_name(text)),
    )
    return parts.whole_tensors(text)


def write_hugging_face_files(folder: Path, family: Family, *, dtype: str) -> None:
    """Turns the configuration and the tokenizer's files in a folder into transformers' form.

    Args:
        folder: Where they are.
        family: Record of the model.
        dtype: Element type of its weights.
    """
    path = folder / "config.json"
    config = read_json_if_present(path)
    code = {AUTO_MAP: config[AUTO_MAP]} if AUTO_MAP in config else {}  # which few records keep
    written = hugging_face_config(config, family, dtype=dtype) | code
    write_json(path, with_present_code(written, folder))
    write_tokenizer_files(folder, family)


def describe_needed_code(folder: Path, family: Family) -> str | None:
    """What has to be put into a folder in Hugging Face's form before transformers can load it; None where nothing has.

    Args:
        folder: Of the result.
        family: Record of its model.
    """
    needed = family.hugging_face.needs_files
    if not needed or AUTO_MAP in read_json_if_present(folder / "config.json"):
        return None
    return (
        f"note: transformers has no {family.name} of its own; copy {needed} into the folder, and the auto_map of the "
        "config.json beside them into its config.json"
    )


def write_tokenizer_files(folder: Path, family: Family) -> None:
    """Gives a tokenizer's files the names, and its class the name, that transformers looks for.

    The chat template of the training takes the place of the tokenizer's own, where jinja can express it.
    """
    ours, theirs = folder / _SENTENCEPIECE, folder / _THEIR_SENTENCEPIECE
    if ours.is_file() and not theirs.exists():
        shutil.move(ours, theirs)
    elif ours.is_file() and ours.read_bytes() == theirs.read_bytes():
        ours.unlink()
    path = folder / "tokenizer_config.json"
    settings = read_json_if_present(path)
    kept = {name: value for name, value in settings.items() if name not in _TOKENIZER_NOTES}
    kept = with_present_code(kept, folder)
    if name := _TOKENIZER_CLASSES.get(str(kept.get("tokenizer_class"))):
        kept["tokenizer_class"] = name
        if name == "PreTrainedTokenizerFast":  # else it gives types of tokens, which few models take
            kept.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if source := template_source(folder, family.tokenizer):
        keep_named(folder, settings)
        (folder / TEMPLATE_FILE).write_text(source, encoding="utf-8")
        kept.pop("chat_template", None)
    if kept != settings:
        write_json(path, kept)


def hugging_face_config(config: Mapping[str, Any], family: Family, *, dtype: str) -> dict[str, Any]:
    """A configuration in transformers' fields; one that has them already keeps them.

    Args:
        config: config.json in PaddleNLP's form or transformers'.
        family: Record of the model.
        dtype: Element type of the weights.

    Raises:
        UserError: A setting that transformers' model has no place for.
    """
    has_distances = family.hugging_face.has_distances
    if config.get(_DISTANCES) and not has_distances:
        raise UserError(
            "config.json has alibi true, which transformers' Llama does not compute: use --save_format paddle"
        )
    if "transformers_version" in config:
        return with_dtype(config, dtype)
    adapted = family.adapt_config(dict(config))
    own = _OWN_FIELDS if has_distances else (*_OWN_FIELDS, _DISTANCES)
    theirs = {name: value for name, value in adapted.items() if not name.startswith(own)}
    if factor := _linear_scaling(adapted):
        theirs["rope_scaling"] = {"rope_type": "linear", "type": "linear", "factor": factor}
    theirs = family.hugging_face.config(without_class_defaults(theirs, family))
    if is_reward_config(config):
        theirs = with_reward_class(theirs, family)
    if theirs.get("use_cache") is False:  # of the training; transformers' own default is true
        del theirs["use_cache"]
    return theirs | {"tie_word_embeddings": says_tied(config, family), "torch_dtype": dtype}


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration of weights of that element type, under the name that its version of transformers has for it."""
    names = [name for name in ("dtype", "torch_dtype") if name in config]
    return dict(config) | dict.fromkeys(names or ["torch_dtype"], dtype)


def with_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The configuration of a model with that many embeddings."""
    grown = {name: size for name in ("vocab_size", "padded_vocab_size") if name in config}
    return dict(config) | (grown or {"vocab_size": size})


def _linear_scaling(config: Mapping[str, Any]) -> float | None:
    return config.get("rope_scaling_factor") if config.get("rope_scaling_type") == "linear" else None


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Writes the configuration of a model of ordinary weights, if it differs from what is there."""
    ordinary = without_format(config)
    if read_json_if_present(path) != ordinary:
        write_json(path, ordinary)
