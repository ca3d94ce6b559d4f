"""GLM-4-9B as first published: whose a folder is, and that the same weights in Hugging Face's form compute the same."""

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import UserError
from finetune.families.config_fields import unknown_fields
from finetune.families.family import find_family, get_family
from finetune.families.tokenizer_kinds import GLM4_TOKENS
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny
from finetune.tokenizers.encoder import FamilyEncoder
from finetune.tokenizers.fast_encoder import load_fast_encoder
from finetune.tokenizers.loading import load_tokenizer
from tests.families import decoding
from tests.reference.chatglm2_qwen_published import published_config, published_weights
from tests.reference.published_forms import as_glm
from tests.texts import draw_texts

PUBLISHED = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False, "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "attn_implementation": "sdpa", "auto_map": {}, "bias_dropout_fusion": True,
    "classifier_dropout": None, "eos_token_id": [151329, 151336, 151338], "ffn_hidden_size": 13696,
    "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 4096, "kv_channels": 128,
    "layernorm_epsilon": 1.5625e-07, "multi_query_attention": True, "multi_query_group_num": 2,
    "num_attention_heads": 32, "num_hidden_layers": 40, "num_layers": 40, "original_rope": True,
    "pad_token_id": 151329, "padded_vocab_size": 151552, "post_layer_norm": True, "rmsnorm": True, "rope_ratio": 500,
    "seq_length": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.30.2",
    "use_cache": True, "vocab_size": 151552,
}  # fmt: skip
SIZES = {
    "9b": ({"rope_ratio": 1, "seq_length": 8192}, 1e4),
    "9b-chat": ({}, 5e6),
    "9b-chat-1m": ({"rope_ratio": 10000, "seq_length": 1048576, "multi_query_group_num": 4}, 1e8),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_published_configuration_is_understood(name):
    fields, base = SIZES[name]
    config = PUBLISHED | fields
    family = find_family(config)
    assert family.name == "chatglm4" and list(unknown_fields(config, family)) == []
    adapted = family.adapt_config(config)
    assert (adapted["rotary_base"], adapted["vocab_size"]) == (base, 151552)
    assert family.position_limit(config) == config["seq_length"]


def test_its_model_of_images_is_no_text_model():
    config = PUBLISHED | {"vision_config": {"hidden_size": 1792}, "boi_token_id": 151339}
    assert any("vision_config" in fault for fault in unknown_fields(config, find_family(config)))


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    options = {"corpus": corpus, "num_layers": 2, "num_key_value_heads": 2, "vocab_size": 340}
    return build_tiny("chatglm4", tmp_path_factory.mktemp("glm4") / "model", **options)


def _as_transformers_has_it(folder, target):
    """The same weights under the names and with the fields of transformers' Glm, whose projections stand apart."""
    config, weights = published_config(folder, "chatglm4"), published_weights(folder, "chatglm4")
    found = as_glm(weights, config)
    target.mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in found.items()}, target / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    fields = {
        "model_type": "glm", "architectures": ["GlmForCausalLM"], "attention_bias": True, "head_dim": config["kv_channels"],
        "hidden_act": "silu", "hidden_size": config["hidden_size"], "intermediate_size": config["ffn_hidden_size"],
        "max_position_embeddings": 512, "num_attention_heads": config["num_attention_heads"], "num_hidden_layers": 2,
        "num_key_value_heads": config["multi_query_group_num"], "partial_rotary_factor": 0.5,
        "rms_norm_eps": config["layernorm_epsilon"], "rope_theta": 1e4 * config["rope_ratio"],
        "tie_word_embeddings": False, "vocab_size": config["padded_vocab_size"],
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(fields))
    return target


def test_logits_equal_those_of_the_form_that_transformers_reads(folder, tmp_path):
    """The family `glm4` equals transformers' GlmForCausalLM: tests/reference/test_logits.py."""
    path = folder / "model.safetensors"
    weights = {name: array * (8 if array.ndim == 2 else 1) for name, array in load_file(path).items()}
    save_file(weights, path, metadata={"format": "np"})
    other = _as_transformers_has_it(folder, tmp_path / "glm")
    ids = np.random.default_rng(0).integers(3, 320, size=(2, 60))
    found = []
    for each in (folder, other):
        model = load_model(resolve_model(each), dtype="float32")
        with paddle.no_grad():
            found.append(decoding.logits(model, ids))
    assert resolve_model(other).family.name == "glm4" and found[0].std() > 0.5
    np.testing.assert_allclose(found[0], found[1], atol=1e-5, rtol=0)


def test_ids_are_those_of_tiktoken(folder):
    """Both readers: spelled by the ranks between the names of tokens, which stand behind them."""
    import base64

    import tiktoken

    lines = (folder / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    names = {name: len(ranks) + place for place, name in enumerate(GLM4_TOKENS)}
    published = tiktoken.Encoding("glm4", pat_str=pattern, mergeable_ranks=ranks, special_tokens=names)
    family = get_family("chatglm4")
    fast, reason = load_fast_encoder(folder, family)
    assert fast is not None, reason
    texts = [
        *draw_texts(200),
        "[gMASK]<sop><|user|>\n12345 上衣<|assistant|>\na  b\n\n",
        "cafe\u0301 ①",
        "<sop>x<eop>",
    ]
    for encoder in (fast, FamilyEncoder(load_tokenizer(folder, family), family)):
        for text in texts:
            as_template = published.encode(text, allowed_special="all")
            assert list(encoder.encode_special(text)) == as_template
            assert list(encoder.encode(text)) == published.encode(text, disallowed_special=())
            assert encoder.decode(encoder.encode(text)) == text
        assert encoder.prefix_ids == (names["[gMASK]"], names["<sop>"])
        assert encoder.chat_end_ids == (names["<|user|>"], names["<|observation|>"])


def test_other_names_for_its_tokens_come_from_the_folder(folder, tmp_path):
    """CodeGeeX4 gives the ids of images to tokens of its own."""
    import shutil

    other = shutil.copytree(folder, tmp_path / "other")
    path = other / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    index = next(
        key for key, value in settings["added_tokens_decoder"].items() if "begin_of_image" in value["content"]
    )
    settings["added_tokens_decoder"][index]["content"] = "<|code_prefix|>"
    settings["additional_special_tokens"] = [
        each.replace("<|begin_of_image|>", "<|code_prefix|>")
        for each in settings["additional_special_tokens"]
    ]
    path.write_text(json.dumps(settings))
    family = get_family("chatglm4")
    for encoder in (
        load_fast_encoder(other, family)[0],
        FamilyEncoder(load_tokenizer(other, family), family),
    ):
        assert encoder.encode_special("<|code_prefix|>") == [int(index)]
        assert len(encoder.encode_special("<|begin_of_image|>")) > 1


def test_a_vocabulary_of_another_kind_is_named(folder, tmp_path):
    import shutil

    other = shutil.copytree(folder, tmp_path / "broken")
    (other / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    with pytest.raises(UserError, match=r"tokenizer.model is no tiktoken rank file.*Copy tokenizer.model"):
        load_tokenizer(other, get_family("chatglm4"))
