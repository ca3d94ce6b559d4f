"""chatglm2 and qwen against models written from their published descriptions.

The logits are compared with NumPy in float64. The curves are compared with the same forward pass on
PyTorch tensors: with golden values that `chatglm2_qwen_training.py` wrote, and live where PyTorch is.
"""

from __future__ import annotations

import importlib.util
import json
import os

import numpy as np
import pytest

from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from tests.conftest import read_log, run_entry, write_arguments
from tests.reference.chatglm2_qwen_curves import CASES, GOLDEN, build_adapter, build_model
from tests.reference.chatglm2_qwen_published import (
    PUBLISHED,
    published_config,
    published_weights,
    write_published,
)
from tests.reference.curves import COMMON, HERE, NUM_STEPS

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
REQUIRED = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each family's tiny checkpoint, in this project's form and as published."""
    root = tmp_path_factory.mktemp("chatglm2_qwen")
    ours = {family: build_model(root / family, family) for family in PUBLISHED}
    return {
        family: {"ours": folder, "published": write_published(folder, root / f"{family}_hf", family)}
        for family, folder in ours.items()
    }


@pytest.mark.parametrize("form", ["ours", "published"])
@pytest.mark.parametrize("family", PUBLISHED)
def test_logits_equal_the_reference(folders, family, form):
    import paddle

    ids = np.random.default_rng(0).integers(10, 600, size=(2, 40))
    marks = PUBLISHED[family].marks  # behind contexts of two lengths
    ids[0, 12 : 12 + len(marks)] = ids[1, 30 : 30 + len(marks)] = marks
    model = load_model(resolve_model(folders[family][form]), dtype="float32")
    with paddle.no_grad():
        output = model(paddle.to_tensor(ids))
    ours = (output[0] if isinstance(output, tuple) else output).numpy()

    folder = folders[family]["ours"]
    weights = {name: array.astype(np.float64) for name, array in published_weights(folder, family).items()}
    theirs = PUBLISHED[family].logits(weights, ids, published_config(folder, family))
    assert theirs.std() > 0.3
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def test_a_published_folder_is_tokenized_like_ours(folders):
    from finetune.tokenizers.encoder import FamilyEncoder
    from finetune.tokenizers.loading import load_tokenizer

    for family, forms in folders.items():
        encoders = []
        for folder in forms.values():
            record = resolve_model(folder).family
            assert record.name == family
            encoders.append(FamilyEncoder(load_tokenizer(folder, record), record))
        first, second = encoders
        assert first.encode("上衣 people 12") == second.encode("上衣 people 12")
        assert first.prefix_ids == second.prefix_ids
        assert (first.eos_token_id, first.pad_token_id) == (second.eos_token_id, second.pad_token_id)


@pytest.fixture(scope="module")
def our_curves(folders, tmp_path_factory):
    """Our curve of each case, through the entry script, computed once."""
    root = tmp_path_factory.mktemp("curves")
    found = {}

    def curve(name: str) -> list[dict[str, float]]:
        if name not in found:
            case = CASES[name]
            model = folders[case.family]["ours"]
            settings = COMMON | case.arguments
            if case.lora:
                settings |= {"lora_path": str(build_adapter(root / f"{name}_adapter", model, case.family))}
            settings |= {
                "model_name_or_path": str(model),
                "dataset_name_or_path": str(HERE / "data"),
                "output_dir": str(root / name),
            }
            assert run_entry(write_arguments(root / f"{name}.json", **settings)) == 0
            found[name] = read_log(root / name)
        return found[name]

    return curve


def assert_same(ours: list[dict], reference: list[dict]) -> None:
    assert len(ours) == len(reference) == NUM_STEPS
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.05, "the curve must move, or equality says nothing"
    for step, (mine, theirs) in enumerate(zip(ours, reference, strict=True), start=1):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4), f"step {step}"
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), f"step {step}"


@pytest.mark.parametrize("name", CASES)
def test_curve_equals_the_golden_one(our_curves, name):
    assert_same(our_curves(name), json.loads(GOLDEN.read_text())["curves"][name])


@pytest.fixture(scope="module")
def live_curves():
    """The reference, trained now."""
    from tests.reference.chatglm2_qwen_training import reference_curves

    return reference_curves()


@pytest.mark.parity
@pytest.mark.skipif(
    not HAS_TORCH and not REQUIRED, reason="PyTorch is not installed; make parity installs it"
)
@pytest.mark.parametrize("name", CASES)
def test_curve_equals_a_live_run_of_the_reference(our_curves, name, live_curves):
    assert_same(our_curves(name), live_curves[name])
