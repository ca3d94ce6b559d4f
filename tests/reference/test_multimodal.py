"""The text part of a multimodal folder gives the logits of text that transformers' multimodal model gives."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.reference.logits import as_transformers_5, largest_difference, our_logits, write_checkpoint
from tests.reference.multimodal import CASES, GOLDEN, with_flat_config, with_newer_names

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def golden_logits(facts) -> np.ndarray:
    return np.array(facts["logits"]["values"], np.float32).reshape(facts["logits"]["shape"])


@pytest.mark.parametrize("name", CASES)
def test_logits_of_text_equal_the_golden_ones(golden, name, tmp_path):
    facts, case = golden[name], CASES[name]
    wanted = golden_logits(facts)
    assert 0.5 < wanted.std() < 1.5, "small logits hide differences, those of large ones are rounding"
    folder = case.write(tmp_path / name, facts["config"], facts["shapes"])
    assert largest_difference(our_logits(folder), wanted) < TOLERANCE
    weights = with_newer_names(case.weights(facts["shapes"]))
    newer = write_checkpoint(tmp_path / "newer", facts["config"], weights)
    assert largest_difference(our_logits(newer), wanted) < TOLERANCE


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.flat])
def test_published_configurations_without_a_part_for_the_text_are_read(golden, name, tmp_path):
    facts, case = golden[name], CASES[name]
    config = with_flat_config(facts["config"])
    assert config["num_hidden_layers"] and "text_config" not in config
    folder = case.write(tmp_path / name, config, facts["shapes"])
    assert largest_difference(our_logits(folder), golden_logits(facts)) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "llava", "gemma3"])
def test_rotary_settings_are_read_where_transformers_5_writes_them(golden, name, tmp_path):
    facts, case = golden[name], CASES[name]
    text = facts["config"]["text_config"]
    moved = as_transformers_5(text)
    if "rope_local_base_freq" in moved:
        local = {"rope_type": "default", "rope_theta": moved.pop("rope_local_base_freq")}
        moved["rope_parameters"] = {"full_attention": moved["rope_parameters"], "sliding_attention": local}
    config = facts["config"] | {"text_config": moved}
    folder = write_checkpoint(tmp_path / name, config, with_newer_names(case.weights(facts["shapes"])))
    assert largest_difference(our_logits(folder), golden_logits(facts)) < TOLERANCE
