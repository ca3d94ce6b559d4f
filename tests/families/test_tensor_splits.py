"""Division of weights over tensor-parallel ranks, against PaddleNLP's own division."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.families.family import families, get_family, import_object
from finetune.families.tensor_splits import find_split
from finetune.families.tiny_recipe import TinyShape
from finetune.storage.splits import Split
from tests.families.cases import FACTS

SHAPE = TinyShape(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    vocab_size=24,
    max_length=16,
)
NAMES = sorted(name for name in families() if FACTS[name].known_to_paddlenlp)


def _shape(name: str, *, num_kv_heads: int = 4, vocab_size: int = 24) -> TinyShape:
    sizes = {**vars(SHAPE), "vocab_size": vocab_size}
    if get_family(name).tiny.grouped_heads:
        sizes["num_kv_heads"] = num_kv_heads
    if ratio := get_family(name).tiny.inner_ratio:
        sizes["intermediate_size"] = ratio * SHAPE.hidden_size
    return TinyShape(**sizes)


def _config(name: str, shape: TinyShape, **options):
    family = get_family(name)
    adapted = family.adapt_config(family.tiny.config(shape))
    config = import_object(family.model_class).config_class.from_dict(adapted)
    for option, value in options.items():
        setattr(config, option, value)
    return config


def _weights(name: str, shape: TinyShape, dtype=np.float32) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    specs = get_family(name).tiny.weights(shape)
    return {key: generator.integers(0, 60000, spec.shape).astype(dtype) for key, spec in specs.items()}


def _check_against_paddlenlp(name, weights, config, degree: int) -> int:
    """Compares every rank's part of every weight; returns how many weights are divided."""
    family, model_class = get_family(name), import_object(get_family(name).model_class)
    config.tensor_parallel_degree = degree
    divided = set()
    for rank in range(degree):
        config.tensor_parallel_rank = rank
        actions = model_class.get_tensor_parallel_convert_actions(config, list(weights), ignore_error=True)
        for key, whole in weights.items():
            split = find_split(family, key, config, degree=degree)
            expected = np.asarray(actions[key](whole)) if key in actions else whole
            part = split.part(whole, degree, rank) if split else whole
            assert part.dtype == whole.dtype
            np.testing.assert_array_equal(part, expected, err_msg=f"{key}, rank {rank}")
            if split:
                divided.add(key)
                assert part.shape == split.part_shape(whole.shape, degree)
                parts = [split.part(whole, degree, each) for each in range(degree)]
                np.testing.assert_array_equal(split.whole(parts), whole, err_msg=key)
    return len(divided)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_parts_are_those_of_paddlenlp(name, degree):
    shape = _shape(name)
    weights = _weights(name, shape)
    assert _check_against_paddlenlp(name, weights, _config(name, shape), degree) > SHAPE.num_layers * 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_kv_heads", "degree"), [(2, 2), (2, 4), (1, 2)])
def test_shared_keys_and_values(name, num_kv_heads, degree):
    family = get_family(name)
    limit = family.fields.num_kv_heads
    if not family.tiny.grouped_heads:
        pytest.skip("the family has as many heads of keys as of queries")
    if limit in family.parallel.tensor_divides and num_kv_heads % degree:
        pytest.skip("the layout is refused")
    shape = _shape(name, num_kv_heads=num_kv_heads)
    assert _check_against_paddlenlp(name, _weights(name, shape), _config(name, shape), degree)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma"])
def test_a_vocabulary_that_does_not_divide_stays_whole(name):
    shape = _shape(name, vocab_size=23)
    weights = _weights(name, shape)
    assert _check_against_paddlenlp(name, weights, _config(name, shape), 2)
    embedding = f"{get_family(name).base_prefix}.embed_tokens.weight"
    assert find_split(get_family(name), embedding, _config(name, shape), degree=2) is None


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_fused_layers(name, num_kv_heads):
    shape = _shape(name, num_kv_heads=num_kv_heads)
    config = _config(name, shape, fuse_attention_qkv=True, fuse_attention_ffn=True)
    weights = _weights(name, shape)
    plain = dict(weights)
    actions, _ = import_object(get_family(name).model_class).get_fuse_or_split_param_convert_actions(
        config, list(weights), is_fuse=True
    )
    for (*parts, whole), action in actions.items():
        weights[whole] = action([weights.pop(part) for part in parts])
    assert any("qkv_proj" in key for key in weights) and any("gate_up_fused" in key for key in weights)
    assert _check_against_paddlenlp(name, weights, config, 2)
    # A rank's fused part holds what it would hold unfused.
    key = f"{name}.layers.1.mlp.gate_up_fused_proj.weight"
    fused = find_split(get_family(name), key, config).part(weights[key], 2, 1)
    gate, up = (plain[key.replace("gate_up_fused", each)] for each in ("gate", "up"))
    half = SHAPE.intermediate_size // 2
    np.testing.assert_array_equal(fused, np.concatenate([gate[:, half:], up[:, half:]], axis=1))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_tied_head_is_divided_like_the_embedding(name):
    config = _config(name, SHAPE, tie_word_embeddings=True)
    weights = {"lm_head.weight": np.arange(24 * 32).reshape(24, 32)}
    assert _check_against_paddlenlp(name, weights, config, 2) == 1
    assert find_split(get_family(name), "lm_head.weight", config).axis == 0


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_low_rank_update_is_divided_like_its_weight(name, degree):
    family, shape = get_family(name), _shape(name)
    config = _config(name, shape)
    generator = np.random.default_rng(5)
    checked = 0
    for key, spec in family.tiny.weights(shape).items():
        if not key.endswith(".weight") or len(spec.shape) != 2 or "embed" in key or "wte" in key:
            continue
        layer = key.removesuffix(".weight")
        a, b = generator.normal(size=(spec.shape[0], 3)), generator.normal(size=(3, spec.shape[1]))
        for rank in range(degree):
            a_part, b_part, expected = (
                split.part(whole, degree, rank) if (split := find_split(family, each, config)) else whole
                for each, whole in ((f"{layer}.lora_A", a), (f"{layer}.lora_B", b), (key, a @ b))
            )
            np.testing.assert_allclose(a_part @ b_part, expected, rtol=1e-12, atol=1e-12)
        checked += 1
    assert checked >= SHAPE.num_layers * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_config_file_gives_the_same_as_a_config_object(name):
    shape = _shape(name, num_kv_heads=2)
    family = get_family(name)
    adapted = family.adapt_config(family.tiny.config(shape))
    for key in family.tiny.weights(shape):
        assert find_split(family, key, adapted) == find_split(family, key, _config(name, shape))


@pytest.mark.parametrize(
    ("key", "axis"),
    [
        ("llama.layers.0.self_attn.q_proj.lora_A", None),
        ("llama.layers.0.self_attn.q_proj.lora_B", -1),
        ("model.llama.layers.0.self_attn.o_proj.lora_A", 0),
        ("llama.layers.0.self_attn.o_proj.lora_B", None),
        ("llama.layers.0.self_attn.o_proj.bias", None),
        ("llama.layers.0.self_attn.q_proj.bias", -1),
        ("llama.layers.0.input_layernorm.weight", None),
        ("embedding.weight", None),  # of prefix tuning
        ("other_lm_head.weight", None),
    ],
)
def test_names(key, axis):
    split = find_split(get_family("llama"), key, _config("llama", SHAPE))
    assert (split.axis if split else None) == axis


def test_one_block_is_a_view_and_several_keep_the_type():
    bits = np.arange(24, dtype=np.uint16).reshape(2, 12)
    assert np.shares_memory(Split(-1).part(bits, 2, 1), bits)
    part = Split(-1, blocks=(4, 1, 1)).part(bits, 2, 1)
    assert part.dtype == np.uint16
    np.testing.assert_array_equal(part[0], [4, 5, 6, 7, 9, 11])


def test_a_degree_that_does_not_fit_is_told():
    with pytest.raises(ValueError, match=r"degree 5 does not divide axis 1 of shape \[2, 12\]"):
        Split(-1).part(np.zeros((2, 12)), 5, 0)
