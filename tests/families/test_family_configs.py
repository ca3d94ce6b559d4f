"""What the records make of config.json: rotary settings, and variants that would be computed wrongly."""

import pytest

from finetune.errors import UserError
from finetune.families.family import find_family, get_family

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
UNSCALED = ("qwen2", "mistral", "gemma")


@pytest.mark.parametrize("name", UNSCALED)
@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ],
)
def test_the_rotary_base_goes_to_the_top(name, settings):
    config = {"model_type": name, **SIZES, **settings}
    before = repr(config)
    adapted = get_family(name).adapt_config(config)
    assert adapted["rope_theta"] == 5e5
    assert not {"rope_parameters", "rope_scaling"} & adapted.keys()
    assert repr(config) == before


YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
REFUSED = [
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types of 1 layers.*num_hidden_layers 4"),
    (
        "gemma2",
        {"layer_types": ["chunked_attention"] * 4},
        "chunked_attention, but must name one of full_attention",
    ),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu', but Gemma 2 is run with"),
    ("gemma3", {"tie_word_embeddings": False}, "tie_word_embeddings False, but Gemma 3"),
    (
        "gemma3",
        {"sliding_window_pattern": "LLG"},
        "sliding_window_pattern is 'LLG', but must be a whole number",
    ),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("glm4", {"hidden_act": "gelu"}, "hidden_act 'gelu', but GLM-4"),
    ("glm4", {"rope_scaling": {"type": "longrope"}}, r"rotary scaling 'longrope'.*allowed: none, linear"),
    ("qwen3", {"rope_scaling": {"type": "yarn"}}, "rotary scaling 'yarn', but lacks factor"),
    (
        "qwen3",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}},
        "has alpha, which is not computed",
    ),
    ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "'longrope', but lacks long_factor"),
    ("llama", {"rope_scaling": {"type": "dynamic"}}, "'dynamic', but lacks factor"),
    *((name, YARN, "rotary scaling 'yarn'.*allowed: none") for name in ("gemma",)),
    ("mistral", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ("mistral", {"hidden_act": "gelu"}, "hidden_act 'gelu', but Mistral"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types of 1 layers.*num_hidden_layers 4"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window None.*give them no window"),
    ("mixtral", {"rope_scaling": {"type": "longrope"}}, "rotary scaling 'longrope'.*allowed: none, linear"),
    (
        "gemma",
        {"hidden_activation": "relu"},
        "hidden_activation 'relu'.*allowed for Gemma: gelu_pytorch_tanh",
    ),
    (
        "gemma",
        {"hidden_activation": "gelu"},
        "hidden_activation 'gelu'; allowed for Gemma: gelu_pytorch_tanh",
    ),
    ("gemma", {"hidden_act": "silu"}, "hidden_act 'silu'; allowed for Gemma: .*, gelu"),
    ("gemma", {"attention_bias": True}, "attention_bias True, but Gemma is run with False only"),
    ("opt", {"activation_function": "gelu"}, "activation_function 'gelu'; allowed for OPT: relu"),
    ("opt", {"enable_bias": False}, "enable_bias False"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm True"),
    ("bloom", {"tie_word_embeddings": False}, "tie_word_embeddings False, but BLOOM is run with True only"),
    ("bloom", {"layer_norm_epsilon": 1e-2}, r"layer_norm_epsilon 0\.01, but .* takes 0 to 0\.001"),
    (
        "gpt2",
        {"activation_function": "relu"},
        "activation_function 'relu'; allowed for GPT-2: gelu_new, gelu_fast",
    ),
    (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx True, but GPT-2 is run with",
    ),
    ("falcon", {"activation": "relu"}, "activation 'relu', but Falcon"),
    ("falcon", {"parallel_attn": False, "new_decoder_architecture": True}, "a form that no Falcon has"),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2; allowed: 1, or 2 with"),
    ("falcon", {"rope_scaling": {"type": "longrope"}}, "rotary scaling 'longrope'.*allowed: none, linear"),
    ("falcon", {"layer_norm_epsilon": 1e-2}, r"layer_norm_epsilon 0\.01, but .* takes 0 to 0\.001"),
    ("gpt2", {"layer_norm_epsilon": 1e-2}, r"layer_norm_epsilon 0\.01, but .* takes 0 to 0\.001"),
    ("gpt2", {"scale_attn_weights": None}, "scale_attn_weights None, but GPT-2 is run with True only"),
    ("gpt2", {"n_head": 8}, "n_head 8 and num_attention_heads 4, which are two names of one field"),
    ("bloom", {"n_head": 8}, "num_attention_heads 4 and n_head 8, which are two names of one field"),
    ("falcon", {"n_head": 8}, "n_head 8 and num_attention_heads 4, which are two names of one field"),
    ("opt", {"ffn_dim": 8, "intermediate_size": 9}, "ffn_dim 8 and intermediate_size 9, which are two names"),
    (
        "qwen2",
        {"hidden_act": "gelu", "rope_scaling": {"type": "linear", "factor": 2.0}},
        "hidden_act 'gelu', but Qwen2",
    ),
    ("qwen", {"tie_word_embeddings": True}, "tie_word_embeddings True, but Qwen is run with False only"),
    ("gemma", {"alibi": True}, "alibi True, but Gemma is run with False only"),
    (
        "gemma3",
        {"attn_logit_softcapping": 50.0},
        r"attn_logit_softcapping 50\.0, but Gemma 3 is run with None only",
    ),
    ("xverse", {"hidden_act": "gelu"}, "hidden_act 'gelu', but XVERSE is run with 'silu' only"),
    ("internlm", {"rotary": {"base": 10000, "type": "linear"}}, "rotary positions of type 'linear'"),
    ("internlm2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling 'linear'"),
    ("internlm2", {"bias": True}, "bias True, but InternLM2 is run with False only"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu', but PaddleNLP's Llama computes silu only"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
def test_what_paddlenlp_would_compute_wrongly_is_refused(name, settings, message):
    with pytest.raises(UserError, match=message):
        get_family(name).adapt_config({"model_type": name, **SIZES, **settings})


@pytest.mark.parametrize("name", ["gemma", "glm4", "llama", "mistral", "qwen2", "qwen3_moe", "xverse"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
            "'linear' .*and 'dynamic'",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
            "'default' .*and 'linear'",
        ),
        (
            {"rope_theta": 5.0, "rope_scaling": {"type": "default", "rope_theta": 6.0}},
            r"rope_theta: 5\.0 \(top\), 6\.0",
        ),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, r"rope_theta: 5\.0 \(top\), 6\.0"),
        (
            {"rope_scaling": {"type": "linear", "factor": -2.0}},
            "factor -2.0, but it must be a number above 0",
        ),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor '2', but it must be a number above 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "factor 0, but it must be a number above 0"),
        (
            {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}},
            r"partial_rotary_factor: 1\.0 \(top\), 0\.5",
        ),
    ],
)
def test_a_rotary_setting_with_two_values_or_a_wrong_one_is_refused(name, settings, message):
    """Releases of transformers differ in which of two they take; a negative factor ends in a crash of the tables."""
    with pytest.raises(UserError, match=message):
        get_family(name).adapt_config({"model_type": name, **SIZES, **settings})


ACCEPTED = [
    ("gemma2", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    ),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("gemma", {"hidden_activation": None, "hidden_act": "gelu"}),  # the first published configs
    ("gemma", {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    ("opt", {"tie_word_embeddings": True}),
    ("bloom", {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-3}),
    ("llama", {"hidden_act": "silu"}),
]


@pytest.mark.parametrize(("name", "settings"), ACCEPTED)
def test_what_is_computed_rightly_is_accepted(name, settings):
    adapted = get_family(name).adapt_config({"model_type": name, **SIZES, **settings})
    assert settings.items() <= adapted.items()


def test_skywork_is_a_llama():
    published = {"model_type": "skywork", "architectures": ["SkyworkForCausalLM"], **SIZES}
    assert find_family(published).name == "llama"
    adapted = get_family("llama").adapt_config(published)
    assert adapted == SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


INTERNLM = [
    ("internlm", {"architectures": ["InternLMForCausalLM"]}),
    ("internlm2", {"architectures": ["InternLM2ForCausalLM"]}),
    ("internlm2", {"auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}}),
    ("internlm2", {"model_type": "internlm2"}),
]


@pytest.mark.parametrize(("name", "settings"), INTERNLM)
def test_generations_of_internlm_are_told_by_their_classes(name, settings):
    assert find_family({"model_type": "internlm", **SIZES, **settings}).name == name


def test_an_internlm_of_no_generation_is_refused_by_both_names():
    with pytest.raises(UserError, match=r"families internlm \(.*InternLM\.\.\.\), internlm2 \(.*InternLM2"):
        find_family({"model_type": "internlm", **SIZES})


BAICHUAN = [
    ("baichuan", {"vocab_size": 64000, "max_position_embeddings": 4096}, False),
    ("baichuan", {"vocab_size": 64000, "model_max_length": 4096}, True),
    ("baichuan2", {"vocab_size": 125696, "max_position_embeddings": 4096}, False),
    ("baichuan2", {"vocab_size": 125700, "z_loss_weight": 0, "model_max_length": 4096}, True),
]


@pytest.mark.parametrize(("name", "settings", "has_distances"), BAICHUAN)
def test_generations_and_sizes_of_baichuan_are_told_apart(name, settings, has_distances):
    config = {"model_type": "baichuan", **SIZES, **settings}
    family = find_family(config)
    adapted = family.adapt_config(config)
    assert (family.name, adapted["has_distances"], adapted["normed_head"]) == (
        name,
        has_distances,
        name == "baichuan2",
    )
    assert family.position_limit(config) == 4096
    rows = {"fused": True, "half": True, "has_prefix": False}
    assert family.packed_mask(config, **rows) == ("block" if has_distances else "start_end")
    # A folder that a run leaves behind, and what is published again, are of the same kind.
    for again in (adapted, family.hugging_face.config(adapted)):
        assert find_family(again) is family
        assert family.adapt_config(again)["has_distances"] == has_distances
    assert family.adapt_config(adapted) == adapted


def test_a_baichuan_of_no_generation_is_refused_by_both_names():
    with pytest.raises(
        UserError, match=r"families baichuan \(vocab_size 64000\), baichuan2 \(vocab_size 125696"
    ):
        find_family({"model_type": "baichuan", "vocab_size": 64002})


def test_fields_of_gpt2_there_and_back():
    found = {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": None,
        "resid_pdrop": 0.0,
    }
    family = get_family("gpt2")
    adapted = family.adapt_config(found)
    assert adapted == {
        "model_type": "gpt2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-5,
        "intermediate_size": 256, "max_position_embeddings": 1024, "tie_word_embeddings": True,
        "attention_dropout": 0.1, "branch_dropout": 0.0, "embedding_dropout": 0.1,
    }  # fmt: skip
    assert family.adapt_config(family.hugging_face.config(adapted)) == adapted | {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
    }


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"model_type": "falcon"}, (1, False, True, 1)),
        ({"model_type": "falcon", "multi_query": False, "parallel_attn": False}, (4, False, False, 1)),
        ({"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2}, (2, True, True, 2)),
        ({"model_type": "falcon", "new_decoder_architecture": True}, (4, True, True, 2)),
        ({"model_type": "RefinedWeb", "n_head": 4, "n_layer": 4, "n_head_kv": 2}, (2, True, True, 2)),
        ({"model_type": "RefinedWeb", "n_head": 4, "n_layer": 4}, (1, True, True, 2)),
        ({"model_type": "RefinedWebModel", "multi_query": True, "parallel_attn": True}, (1, False, True, 1)),
        ({"model_type": "RefinedWebModel", "n_head": 4}, (4, False, False, 1)),
        ({"alibi": True, "multi_query": False, "parallel_attn": False}, (4, False, False, 1)),
    ],
)
def test_forms_of_falcon_there_and_back(found, expected):
    sizes = SIZES if "n_head" not in found else {"hidden_size": 64}
    adapt, publish = get_family("falcon").adapt_config, get_family("falcon").hugging_face.config
    adapted = adapt(found | sizes)
    names = ("num_key_value_heads", "new_decoder_architecture", "parallel_attn", "num_ln_in_parallel_attn")
    assert tuple(adapted[name] for name in names) == expected
    assert (adapted["intermediate_size"], adapted["num_attention_heads"]) == (256, 4)
    assert adapted["alibi"] == publish(adapted)["alibi"] == found.get("alibi", False)
    assert adapt(publish(adapted)) == adapted | {"architectures": ["FalconForCausalLM"]}


def test_rotary_settings_of_internlm():
    adapt = get_family("internlm").adapt_config
    adapted = adapt({"rotary": {"base": 50000, "type": "dynamic"}, "bias": False, **SIZES})
    assert adapted == {"rope_theta": 50000, "bias": False, **SIZES}
    assert get_family("internlm").hugging_face.config(adapted)["rotary"]["base"] == 50000
    scaling = {"type": "dynamic", "factor": 2.0}
    assert get_family("internlm2").adapt_config({"rope_scaling": scaling, **SIZES})["rope_scaling"] == scaling


def test_a_window_that_no_layer_uses_is_accepted():
    settings = {"use_sliding_window": True, "max_window_layers": 4, "sliding_window": 8}
    assert get_family("qwen2").adapt_config({**SIZES, **settings})["sliding_window"] is None


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_windows_are_those_that_transformers_reads(name):
    family = get_family(name)
    adapted = family.adapt_config({**SIZES, "use_sliding_window": True, "max_window_layers": 3})
    assert adapted["sliding_window"] == 4096
    assert adapted["layer_types"] == ["full_attention"] * 3 + ["sliding_attention"]
    assert family.adapt_config(adapted) == adapted
    off = {"use_sliding_window": False, "max_window_layers": 0, "sliding_window": 8}
    assert family.adapt_config({**SIZES, **off})["sliding_window"] is None


def test_names_of_bloom_sizes_are_made_one():
    adapted = get_family("bloom").adapt_config({"n_embed": 64, "n_layer": 2, "num_attention_heads": 4})
    assert adapted == {"hidden_size": 64, "n_layer": 2, "n_head": 4}


def test_names_of_opt_fields_are_paddlenlps():
    found = {
        "hidden_size": 64, "ffn_dim": 128, "do_layer_norm_before": False, "dropout": 0.1,
        "attention_dropout": 0.0, "activation_function": "gelu_new",
    }  # fmt: skip
    assert get_family("opt").adapt_config(found) == {
        "hidden_size": 64, "intermediate_size": 128, "normalize_before": False, "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.0, "hidden_act": "gelu", "word_embed_proj_dim": 64,
    }  # fmt: skip


def test_layers_without_a_list_have_the_windows_of_the_published_models():
    two, three = (get_family(name).adapt_config({"num_hidden_layers": 7}) for name in ("gemma2", "gemma3"))
    narrow, whole = "sliding_attention", "full_attention"
    assert two["layer_types"] == [narrow, whole, narrow, whole, narrow, whole, narrow]
    assert three["layer_types"] == [narrow] * 5 + [whole, narrow]
    assert three["rope_local_base_freq"] == 10000.0 and three["rope_theta"] == 1000000.0


_ROTARY = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
# Family: what transformers takes for fields that a config.json leaves out, and no weight tells.
LEFT_OUT = {
    "ernie4_5": {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "head_dim": 128,
    },
    "mistral": _ROTARY | {"max_position_embeddings": 131072, "sliding_window": 4096},
    "mixtral": {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
    },
    "phi3": {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
    },
    "qwen2_moe": {"num_key_value_heads": 16},
    "qwen3": _ROTARY | {"max_position_embeddings": 32768, "head_dim": 128, "num_key_value_heads": 32},
    "qwen3_moe": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_fields_that_are_left_out_are_those_of_transformers(name):
    adapted = get_family(name).adapt_config(SIZES)
    assert {field: adapted.get(field) for field in LEFT_OUT[name]} == LEFT_OUT[name]
    given = {"max_position_embeddings": 64, "rms_norm_eps": 1e-3, "rope_theta": 5.0, "sliding_window": None}
    adapted = get_family(name).adapt_config(SIZES | given)
    assert {field: adapted.get(field) for field in given} == given, "null is no window"


def test_both_rotary_settings_of_gemma_3_in_the_form_of_transformers_5():
    kinds = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    }
    adapted = get_family("gemma3").adapt_config({"num_hidden_layers": 2, "rope_parameters": kinds})
    assert adapted["rope_theta"] == 2e6 and adapted["rope_local_base_freq"] == 5e3
    assert adapted["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert get_family("gemma3").adapt_config(adapted) == adapted
    kinds["sliding_attention"]["rope_type"] = "yarn"
    with pytest.raises(UserError, match=r"rotary scaling 'yarn'.*allowed: none"):
        get_family("gemma3").adapt_config({"num_hidden_layers": 2, "rope_parameters": kinds})


def test_texts_of_a_longrope_model_end_at_the_length_of_its_pretraining():
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    lengths = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    phi3 = get_family("phi3")
    assert phi3.position_limit(SIZES | lengths | {"rope_scaling": scaling}) == 4096
    assert phi3.position_limit(SIZES | lengths) == 131072
    adapted = phi3.adapt_config(SIZES | lengths | {"rope_scaling": scaling})
    assert phi3.adapt_config(adapted) == adapted
    theirs = phi3.hugging_face.config(adapted)
    assert theirs["rope_scaling"] == scaling and theirs["max_position_embeddings"] == 131072
