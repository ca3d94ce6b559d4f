"""Fields of config.json that no record reads are refused by name; those that ask for nothing pass."""

from __future__ import annotations

import json

import pytest

from finetune.errors import UserError
from finetune.families.config_fields import unknown_fields, unread_fields
from finetune.families.family import families, get_family, import_object
from finetune.families.registry import foreign_classes
from finetune.families.tiny_recipe import TinyShape
from finetune.models.resolve import resolve_model

SHAPE = TinyShape(
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    vocab_size=64,
    max_length=64,
)
# Other architectures' fields -> a value with which they change what a model computes.
FOREIGN = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "attention_multiplier": 0.015625,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "logit_scale": 0.0625,
    "clip_qkv": 8.0,
    "use_qk_norm": True,
    "qk_layernorm": True,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 144,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention"],
    "partial_rotary_factor": 0.5,
    "rope_ratio": 500,
    "rotary_pct": 0.25,
    "position_embedding_type": "alibi",
    "use_parallel_residual": True,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 64,
    "moe_intermediate_size": 1408,
    "kv_lora_rank": 512,
    "no_rope_layers": [1, 1, 0],
    "lm_head_bias": True,
    "norm_head": True,
    "mup_head_factor": 3,
}
NOTES = {"new_field": {"x": [1]}, "a_word_of_next_year": 3, "trained_by": "somebody"}
HARMLESS = {
    "_name_or_path": "somewhere",
    "_attn_implementation_autoset": True,
    "architectures": ["A"],
    "attention_dropout": 0.1,
    "auto_map": {"AutoModel": "modeling.Model"},
    "cache_implementation": "hybrid",
    "embedding_multiplier": 1.0,
    "eos_token_id": [1, 2],
    "id2label": {"0": "a"},
    "max_window_layers": 28,
    "num_experts": 0,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 2,
    "rope_ratio": 1,
    "torch_dtype": "bfloat16",
    "unsloth_version": "2025.1",
    "use_qk_norm": False,
    "clip_qkv": None,
}


def own_config(name):
    return get_family(name).tiny.config(SHAPE)


@pytest.mark.parametrize("name", sorted(families()))
def test_foreign_fields_are_refused_by_their_names(name):
    """By this table, or by the record, which says more; in the family that computes it, by neither."""
    family, own = get_family(name), own_config(name)
    for field, value in FOREIGN.items():
        faults = list(unknown_fields(own | {field: value}, family))
        if field in own or field in family.understood:
            assert faults == [], field
            continue
        assert len(faults) == 1 and faults[0].startswith(f"config.json has {field} ")
        assert f"which family {name} does not read" in faults[0] and f"delete {field} from" in faults[0]
    assert sum(field in own or field in family.understood for field in FOREIGN) < 8


@pytest.mark.parametrize("name", sorted(families()))
def test_fields_that_ask_for_nothing_pass(name):
    for field, value in HARMLESS.items():
        assert list(unknown_fields(own_config(name) | {field: value}, get_family(name))) == [], field
        assert unread_fields(own_config(name) | {field: value}, get_family(name)) == [], field


@pytest.mark.parametrize("name", sorted(families()))
def test_notes_of_other_tools_are_told_and_not_refused(name):
    for field, value in NOTES.items():
        config = own_config(name) | {field: value}
        assert list(unknown_fields(config, get_family(name))) == [], field
        (line,) = unread_fields(config, get_family(name))
        assert line == (
            f"warning: config.json has {field} {value!r}, which nothing here reads: it is taken to have no effect"
        )


@pytest.mark.parametrize("name", sorted(families()))
def test_what_the_project_writes_passes(name):
    """The configuration beside trained weights holds all that PaddleNLP's object knows."""
    family = get_family(name)
    model_class = import_object(family.class_path(own_config(name)))
    saved = model_class.config_class.from_dict(family.adapt_config(own_config(name)))
    for text in (saved.to_json_string(), saved.to_json_string(use_diff=False)):
        assert list(unknown_fields(json.loads(text), family)) == []


def test_an_activation_that_is_named_twice_passes():
    llama, own = get_family("llama"), own_config("llama")
    assert list(unknown_fields(own | {"activation": "swiglu"}, llama)) == []
    for wrong in ({"activation": "gelu"}, {"activation": "swiglu", "hidden_act": "gelu"}):
        assert len(list(unknown_fields(own | wrong, llama))) == 1


def test_granite_mapped_to_llama_is_refused_before_weights_are_read(llama_folder):
    path = llama_folder / "config.json"
    granite = {
        name: FOREIGN[name] for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | granite))
    (llama_folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"(?s)embedding_multiplier 12\.0.*residual_multiplier 0\.22.*logits_scaling 8\.0"
    ) as found:
        resolve_model(llama_folder)
    assert "model.safetensors" not in str(found.value)


OF_THE_FAMILY = {
    "chatglm3": ["ChatGLMModel"],
    "ernie4_5": ["Ernie4_5_ForCausalLM"],
    "gemma3": ["Gemma3TextModel"],
    "gpt2": ["GPT2Model"],
    "llama": ["LlamaForSequenceClassification"],
    "mistral": ["MistralModel"],
    "qwen2": ["Qwen2ForRewardModel"],
    "qwen": ["QWenLMHeadModel"],
}


@pytest.mark.parametrize("name", OF_THE_FAMILY)
def test_classes_of_the_family_with_another_head_are_no_news(name):
    assert foreign_classes({"architectures": OF_THE_FAMILY[name]}, get_family(name)) == []
    assert foreign_classes({}, get_family(name)) == []


@pytest.mark.parametrize("named", ["LlamaEncoderModel", "MiniCPMForCausalLM", "MistralForCausalLM"])
def test_a_class_of_another_model_is_told(named):
    (line,) = foreign_classes({"model_type": "llama", "architectures": [named]}, get_family("llama"))
    assert line.startswith(
        f"warning: config.json names the class {named}, which is none of family llama: it is "
    )
