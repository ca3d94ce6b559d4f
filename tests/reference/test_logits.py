"""Checkpoints in transformers' format give transformers' logits.

Without PyTorch the comparison is with golden values that `transformers_logits.py` wrote; the tests
marked `parity` compare with a model that transformers builds, computes and saves now.

The tolerance is absolute and the same for every case: no logit of a token (padding aside) may differ by
1e-5 or more. The large weights give logits with a standard deviation between 0.5 and 1.5, which
is checked, so it means about 1e-5 of their spread. Both sides compute in float32, whose rounding makes up
a few 1e-6 of that.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os

import numpy as np
import pytest

from tests.reference.logits import (
    CASES,
    GOLDEN_CHECKPOINTS,
    GOLDEN_LOGITS,
    LARGE,
    REALISTIC,
    as_transformers_5,
    draw_weights,
    largest_difference,
    our_logits,
    write_checkpoint,
)

TOLERANCE = 1e-5
ROTARY = [name for name, case in CASES.items() if "rope_theta" in case.config and not case.form.is_custom]
HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
REQUIRED = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"
needs_torch = pytest.mark.skipif(
    not HAS_TORCH and not REQUIRED, reason="PyTorch is not installed; make parity installs it"
)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN_LOGITS) as logits:
        return json.loads(GOLDEN_CHECKPOINTS.read_text())["checkpoints"], dict(logits)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_golden_ones(golden, name, tmp_path):
    checkpoints, logits = golden
    folder = CASES[name].write(tmp_path / name, checkpoints[name]["config"], checkpoints[name]["shapes"])
    assert 0.5 < logits[name].std() < 1.5, "small logits hide differences, those of large ones are rounding"
    assert largest_difference(our_logits(folder), logits[name]) < TOLERANCE


@pytest.mark.parametrize("name", ROTARY)
def test_configs_of_transformers_5_give_the_same_logits(golden, name, tmp_path):
    checkpoints, logits = golden
    config = as_transformers_5(checkpoints[name]["config"])
    folder = CASES[name].write(tmp_path / name, config, checkpoints[name]["shapes"])
    assert largest_difference(our_logits(folder), logits[name]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "model_type", "heads"),
    [("falcon_7b", "RefinedWebModel", {}), ("falcon_40b", "RefinedWeb", {"n_head_kv": 2})],
)
def test_the_first_releases_of_falcon_are_read(golden, name, model_type, heads, tmp_path):
    """Other fields in config.json, and a copy of the embedding as the output layer."""
    checkpoints, logits = golden
    config = checkpoints[name]["config"] | {"model_type": model_type, "architectures": ["RWForCausalLM"]}
    for field in ("num_kv_heads", "new_decoder_architecture", "num_ln_in_parallel_attn"):
        config.pop(field)
    config |= {
        "n_head": config.pop("num_attention_heads"),
        "n_layer": config.pop("num_hidden_layers"),
        **heads,
    }
    weights = draw_weights(CASES[name], checkpoints[name]["shapes"], LARGE)
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].copy()
    folder = write_checkpoint(tmp_path / name, config, weights)
    assert largest_difference(our_logits(folder), logits[name]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "prefix"), [("bloom", "transformer."), ("opt_350m", "model."), ("gpt2", "transformer.")]
)
def test_names_of_the_first_releases_are_read(golden, name, prefix, tmp_path):
    """The published BLOOM and OPT files name weights without the part that transformers puts in front."""
    checkpoints, logits = golden
    weights = draw_weights(CASES[name], checkpoints[name]["shapes"], LARGE)
    assert any(key.startswith(prefix) for key in weights)
    bare = {key.removeprefix(prefix): array for key, array in weights.items()}
    folder = write_checkpoint(tmp_path / name, checkpoints[name]["config"], bare)
    assert largest_difference(our_logits(folder), logits[name]) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen2_tied", "bloom", "gemma", "opt"])
def test_a_stored_copy_of_tied_embeddings_is_no_fault(golden, name, tmp_path):
    """Checkpoints converted from pickles hold the output layer although it is the embedding."""
    checkpoints, logits = golden
    weights = draw_weights(CASES[name], checkpoints[name]["shapes"], LARGE)
    names = ("embed_tokens.weight", "word_embeddings.weight")
    (embedding,) = (array for key, array in weights.items() if key.endswith(names))
    weights["lm_head.weight"] = embedding.copy()
    folder = write_checkpoint(tmp_path / name, checkpoints[name]["config"], weights)
    assert largest_difference(our_logits(folder), logits[name]) < TOLERANCE


def test_the_window_and_the_scaling_matter(golden):
    """The pairs of cases that differ in one setting have different logits, so that setting is tested."""
    _, logits = golden
    assert np.abs(logits["mistral"] - logits["mistral_window"]).max() > 0.1
    assert np.abs(logits["llama"] - logits["llama3"]).max() > 0.01


def test_ministral_has_the_window_in_the_layers_that_are_named(golden, tmp_path):
    """In none and in all it is Mistral; one such layer more or less is another model."""
    checkpoints, logits = golden
    config = checkpoints["mistral_window"]["config"] | {"model_type": "ministral"}
    found = []
    for number, num_narrow in enumerate((0, 1, 2, 3)):
        kinds = ["sliding_attention"] * num_narrow + ["full_attention"] * (3 - num_narrow)
        shapes = checkpoints["mistral_window"]["shapes"]
        folder = CASES["mistral"].write(tmp_path / str(number), config | {"layer_types": kinds}, shapes)
        found.append(our_logits(folder))
    assert largest_difference(found[0], logits["mistral"]) < TOLERANCE
    assert largest_difference(found[3], logits["mistral_window"]) < TOLERANCE
    assert min(largest_difference(*pair) for pair in itertools.pairwise(found)) > 0.1


@pytest.mark.parity
@needs_torch
@pytest.mark.parametrize("scale", [LARGE, REALISTIC], ids=["large", "realistic"])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name, scale, golden, tmp_path):
    from tests.reference.transformers_logits import build_reference, reference_logits, shapes_of

    model = build_reference(CASES[name], scale)
    reference = reference_logits(model)
    if scale == LARGE:
        assert largest_difference(golden[1][name], reference) < TOLERANCE
    folder = tmp_path / name
    model.save_pretrained(folder, safe_serialization=True)
    if CASES[name].form.is_custom:
        config = json.loads((folder / "config.json").read_text())
        folder = CASES[name].write(tmp_path / "published", config, shapes_of(model), scale)
    assert largest_difference(our_logits(folder), reference) < TOLERANCE
