"""Llamas that config.json gives biases or heads of a size of their own: another class, the same abilities."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune.errors import UserError
from finetune.families.family import get_family
from tests.reference.logits import write_checkpoint
from tests.serving.export.builders import dynamic_model, dynamic_text, export_folder, prompts

BIASED, WIDE = {"attention_bias": True, "mlp_bias": True}, {"head_dim": 16}
VARIANTS = pytest.mark.parametrize("changes", [BIASED, WIDE, BIASED | WIDE], ids=["biased", "wide", "both"])


def build_variant(folder, changes):
    """A tiny Llama with its tokenizer, in Hugging Face's layout."""
    from finetune.models.tiny.checkpoint import build_tiny

    options = {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 330,
    }
    build_tiny("llama", folder, max_length=128, **options)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    written = write_checkpoint(folder / "written", config, _weights(config))
    for path in written.iterdir():
        path.rename(folder / path.name)
    written.rmdir()
    return folder


def _weights(config):
    draw = np.random.default_rng(4).standard_normal
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = (head_dim * config[f"num_{name}_heads"] for name in ("attention", "key_value"))
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden), "lm_head": (config["vocab_size"], hidden)}
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        shapes |= {
            f"{layer}self_attn.{name}_proj": (size, hidden)
            for name, size in zip("qkv", (queries, keys, keys), strict=True)
        }
        shapes[f"{layer}self_attn.o_proj"] = (hidden, queries)
        shapes |= {f"{layer}mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj"] = (hidden, inner)
    weights = {f"{name}.weight": draw(shape).astype(np.float32) * 0.2 for name, shape in shapes.items()}
    for name, (size, _) in shapes.items():
        if config.get("attention_bias" if "self_attn" in name else "mlp_bias") and "layers" in name:
            weights[f"{name}.bias"] = draw(size).astype(np.float32) * 0.3
    norms = [f"model.layers.{number}.{name}_layernorm" for number in range(config["num_hidden_layers"])
             for name in ("input", "post_attention")]  # fmt: skip
    return weights | {f"{name}.weight": np.ones(hidden, np.float32) for name in [*norms, "model.norm"]}


@VARIANTS
def test_texts_with_cache_without_and_exported_are_one(changes, tmp_path):
    from finetune.serving.decoding.decoder import StaticDecoder
    from finetune.serving.decoding.settings import DecodingSettings

    folder = build_variant(tmp_path / "model", changes)
    greedy = DecodingSettings(max_new_tokens=20, stop_ids=())
    model = dynamic_model(folder)
    expected = dynamic_text(model, prompts(), greedy)
    assert StaticDecoder(export_folder(folder, tmp_path / "exported")).generate(prompts(), greedy) == expected
    model.config.use_cache = False
    assert _without_cache(model, prompts()[0], 20) == expected[0]


def _without_cache(model, row, num_tokens):
    import paddle

    ids = list(row)
    with paddle.no_grad():
        for _ in range(num_tokens):
            logits = model(paddle.to_tensor([ids]), use_cache=False)
            logits = logits[0] if isinstance(logits, tuple) else logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(row) :]


@VARIANTS
def test_joined_layers_compute_the_same(changes, tmp_path):
    import paddle

    from finetune.models.loading import load_model
    from finetune.models.resolve import resolve_model

    folder = build_variant(tmp_path / "model", changes)
    joined = {"fuse_attention_qkv": True, "fuse_attention_ffn": True}
    ids, logits = paddle.to_tensor([prompts()[0]]), []
    for overrides in ({}, joined):
        model = load_model(resolve_model(folder), dtype="float32", config_overrides=overrides)
        assert any("gate_up_fused_proj" in name for name in model.state_dict()) == bool(overrides)
        with paddle.no_grad():
            outputs = model(ids)
        logits.append((outputs[0] if isinstance(outputs, tuple) else outputs).numpy())
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)


def test_a_bias_that_the_files_lack_is_missed(tmp_path):
    from safetensors.numpy import load_file

    folder = build_variant(tmp_path / "model", BIASED)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack \(1\): llama.layers.1.mlp.up_proj.bias"):
        dynamic_model(folder)


def test_plain_llamas_keep_paddlenlps_class():
    family = get_family("llama")
    sizes = {"hidden_size": 32, "num_attention_heads": 4}
    for changes in ({}, {"head_dim": 8}, {"attention_bias": False, "mlp_bias": False}):
        assert family.class_path(sizes | changes) == family.model_class
    for changes in (BIASED, WIDE):
        assert family.class_path(sizes | changes) == "finetune.families.llama.own_layers.LlamaForCausalLM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alibi": True}, "alibi True"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rotary scaling 'ntk'"),
    ],
)
def test_what_they_do_not_compute_is_refused(changes, message):
    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, **BIASED, **changes}
    with pytest.raises(UserError, match=message):
        get_family("llama").adapt_config(config)
