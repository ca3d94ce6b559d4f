"""What is trained, worked out from settings, is what the adapted model trains."""

from __future__ import annotations

import pytest

from finetune.adapters.frozen_parts import choice_of, freeze_parts
from finetune.adapters.lora import add_lora
from finetune.adapters.prefix import add_prefix
from finetune.adapters.trained_shapes import plan_trained
from finetune.families.family import get_family
from finetune.families.tiny_recipe import TinyShape
from finetune.models.layers import named_weights
from finetune.models.loading import build_config, find_model_class
from finetune.models.resolve import ResolvedModel
from finetune.models.weight_shapes import weight_shapes
from finetune.processes.groups import ProcessGroups
from finetune.settings.arguments import parse_arguments
from tests.models.odd_shape import SHAPE

RUNS = (
    ("llama", []),
    ("qwen2", ["--freeze_layers", "1"]),
    ("llama", ["--freeze_parameters_ratio", "0.5"]),
    ("llama", ["--trainable_parameters", "self_attn"]),
    ("llama", ["--lora", "true"]),
    ("llama", ["--lora", "true", "--lora_target_modules", "q_proj,v_proj", "--modules_to_save", "lm_head"]),
    ("llama", ["--lora", "true", "--lora_target_modules", "embed_tokens,q_proj"]),
    ("qwen2", ["--lora", "true", "--lora_bias", "all", "--rank_pattern", '{"q_proj": 3}']),
    ("qwen2", ["--lora", "true", "--lora_bias", "lora_only", "--use_dora", "true"]),
    ("llama", ["--lora", "true", "--lora_use_mixer", "true"]),
    ("llama", ["--vera", "true", "--lora", "true"]),
    ("llama", ["--lokr", "true", "--lora", "true", "--lokr_dim", "2", "--decompose_both", "true"]),
    ("qwen3_moe", ["--lora", "true", "--lora_target_modules", "all"]),
    ("chatglm2", ["--lora", "true"]),
    ("bloom", ["--lora", "true", "--lora_target_modules", "all"]),
    ("qwen2", ["--prefix_tuning", "true", "--num_prefix_tokens", "5"]),
    ("chatglm2", ["--prefix_tuning", "true"]),
)


@pytest.mark.parametrize(
    ("name", "words"), RUNS, ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_as_built(name, words, tmp_path):
    family = get_family(name)
    shape = SHAPE if family.tiny.grouped_heads else TinyShape(**vars(SHAPE) | {"num_kv_heads": 4})
    config = family.tiny.config(shape) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    resolved = ResolvedModel(None, name, config, family)
    required = ["--model_name_or_path", str(tmp_path), "--dataset_name_or_path", str(tmp_path)]
    required += ["--output_dir", str(tmp_path / "out"), "--do_train", "true", "--device", "cpu"]
    settings = parse_arguments([*required, *words]).model
    adapted = family.adapt_config(config)
    planned = plan_trained(settings, family, adapted, weight_shapes(family, adapted))
    model_class = find_model_class(resolved)
    model = model_class(build_config(resolved, model_class, dtype="float32", overrides={"use_cache": False}))
    if settings.lora:
        model = add_lora(model, settings, family=family, dtype="float32")
    elif settings.prefix_tuning:
        model = add_prefix(model, settings, family=family, dtype="float32")
    elif (choice := choice_of(settings)).is_made:
        freeze_parts(model, choice, family, ProcessGroups())
    built = {name: tuple(each.shape) for name, each in named_weights(model).items()}
    trained = {name for name, each in named_weights(model).items() if not each.stop_gradient}
    assert {name.removeprefix("model."): shape for name, shape in built.items()} == planned.all
    assert {name.removeprefix("model.") for name in trained} == planned.updated
