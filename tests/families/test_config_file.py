"""What config.json may hold."""

from __future__ import annotations

import pytest

from finetune.families.config_file import find_wrong_fields

# As published models have them.
RIGHT = {
    "Qwen leaves its kernels to the program": {
        "use_flash_attn": "auto",
        "use_dynamic_ntk": True,
        "no_bias": True,
    },
    "PaddleNLP keeps the layers that are not recomputed": {"no_recompute_layers": [0, 1]},
    "Qwen keeps the number of a window that is off": {"sliding_window": 0, "use_sliding_window": False},
    "several end tokens": {"eos_token_id": [151645, 151643], "pad_token_id": -1},
    "numbers for flags": {"use_cache": 1, "sequence_parallel": 0},
    "nothing said": {
        "quantization_config": None,
        "rope_scaling": None,
        "n_inner": None,
        "sliding_window": None,
    },
    "switches with other names": {"learned_embeddings": True, "scale_embeddings": False},
    "whole numbers for others": {"rope_theta": 10000, "rms_norm_eps": 1e-6, "attention_dropout": 0},
}
WRONG = [
    ({"hidden_size": "16"}, 'hidden_size is "16", but must be a whole number of 1 or more'),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0, but must be a whole number of 1 or more"),
    ({"intermediate_size": 0}, "intermediate_size is 0, but must be"),
    ({"head_dim": 0}, "head_dim is 0, but must be"),
    ({"num_kv_heads": 0}, "num_kv_heads is 0, but must be"),
    ({"sliding_window": 0}, "sliding_window is 0, but must be a whole number of 1 or more"),
    ({"sliding_window": False}, "sliding_window is false, but must be"),
    ({"max_position_embeddings": None}, "max_position_embeddings is null, but must be"),
    ({"tie_word_embeddings": None}, 'tie_word_embeddings is null, but must be true, false or "auto"'),
    ({"num_hidden_layers": True}, "num_hidden_layers is true"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"no_recompute_layers": ["x"]}, "a number of layers or their numbers"),
    ({"use_cache": "yes"}, 'must be true, false or "auto"'),
    ({"rope_theta": [1]}, "rope_theta is [1], but must be a number above 0"),
    ({"rope_theta": 0}, "rope_theta is 0, but must be a number above 0"),
    ({"rope_local_base_freq": -1.0}, "rope_local_base_freq is -1.0, but must be a number above 0"),
    ({"rms_norm_eps": 1e400}, "rms_norm_eps is Infinity"),
    ({"architectures": "LlamaForCausalLM"}, "a list of names"),
    ({"layer_types": 3}, "layer_types is 3, but must be a list of names"),
    ({"rope_parameters": [1]}, "rope_parameters is [1], but must be an object"),
    ({"rotary": "linear"}, 'rotary is "linear", but must be an object'),
    ({"num_hidden_layers": None}, "num_hidden_layers is null, but must be a whole number"),
    ({"num_hidden_layers": [1]}, "num_hidden_layers is [1], but must be a whole number"),
    ({"eos_token_id": "2"}, "the number of a token"),
]


@pytest.mark.parametrize("config", RIGHT.values(), ids=RIGHT)
def test_what_published_models_hold_is_right(config):
    assert list(find_wrong_fields(config)) == []


@pytest.mark.parametrize(("config", "fault"), WRONG)
def test_what_no_model_can_have_is_named(config, fault):
    (found,) = find_wrong_fields(config)
    assert fault in found
