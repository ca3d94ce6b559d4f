"""Adapters of other kinds than LoRA that peft trained: used, trained further, merged here, and given back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from finetune.merge.lora import MergeOptions, export_peft, merge
from tests.merge.lora_writing import folder_logits, logits, write_base
from tests.reference.exchange import check_close, load_theirs, their_logits, train_peft
from tests.reference.test_peft_adapters import check_both_ways, load_here, our_curve, pytestmark, their_curve

__all__ = ["pytestmark"]

VERA, LOKR = "VeraConfig", "LoKrConfig"
CASES = {
    "vera": (VERA, {"r": 16, "projection_prng_key": 5}),
    "vera of the key": (VERA, {"r": 12, "save_projection": False, "d_initial": 0.4}),
    "vera with a module": (VERA, {"r": 16, "modules_to_save": ["lm_head"], "target_modules": "all-linear"}),
    "lokr": (
        LOKR,
        {"alpha": 6, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 3}},
    ),
    "lokr of both": (LOKR, {"r": 1, "decompose_both": True, "decompose_factor": 8}),
    "lokr as lycoris": (
        LOKR,
        {"init_weights": "lycoris", "decompose_factor": 3, "target_modules": "all-linear"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_used_and_merged_as_in_peft(case, tmp_path):
    kind, settings = CASES[case]
    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    expected = their_logits(train_peft(base, tmp_path / "adapter", kind, **settings))
    check_both_ways(base, tmp_path / "adapter", expected, tmp_path)
    merge(MergeOptions(base, (tmp_path / "adapter",), tmp_path / "merged"))
    check_close(folder_logits(tmp_path / "merged"), expected)


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_in_peft_and_comes_back(case, tmp_path):
    import peft

    from finetune.adapters.files import save_adapter

    kind, settings = CASES[case]
    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    theirs = train_peft(base, tmp_path / "adapter", kind, **settings)
    ours = load_here(base, tmp_path / "adapter")
    found, expected = our_curve(ours), their_curve(theirs)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[0] - min(expected) > 0.05, "it learned"
    expected_logits = logits(ours)
    (tmp_path / "again").mkdir()
    save_adapter(ours, tmp_path / "again")
    export_peft(MergeOptions(base, (tmp_path / "again",), tmp_path / "exported", save_format="peft"))
    exported = peft.PeftModel.from_pretrained(load_theirs(base), tmp_path / "exported").eval()
    check_close(their_logits(exported), expected_logits)
    written, original = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("exported", "adapter")
    )
    spelt_otherwise = {"target_modules", "rank_pattern", "alpha_pattern", "init_weights"}
    given = {name: original[name] for name in settings.keys() - spelt_otherwise}
    assert {name: written[name] for name in given} == given
