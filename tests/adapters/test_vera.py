"""VeRA: shared matrices that are peft's, parts of them on parts of a model, and what does not go together."""

from __future__ import annotations

import json

import numpy as np
import pytest

from finetune.adapters.adapted_modules import adapted_sizes
from finetune.adapters.adapter_folder import find_adapter_faults
from finetune.adapters.files import save_adapter
from finetune.adapters.lora import add_lora, load_lora
from finetune.adapters.projections import PROJECTIONS_FILE, draw_projections, read_projections
from finetune.adapters.vera import LocalProjections
from finetune.errors import UserError
from tests.adapters.conftest import make_stage

# vera_A[0, 0], [-1, -1] and vera_B[0, 0], [-1, -1] of peft.tuners.vera.model for 7 inputs, 5 outputs and rank 3.
THEIRS = {
    0: (-0.006931448820978403, 0.3362736999988556, 1.174345850944519, -1.3244972229003906),
    2**32 + 9: (0.28845682740211487, 0.36059921979904175, 0.9092544913291931, -0.26408305764198303),
}


@pytest.fixture
def vera(settings):
    """Settings of VeRA."""
    more = {
        "vera": True,
        "vera_rank": 6,
        "projection_prng_key": 3,
        "d_initial": 0.25,
        "save_projection": True,
    }
    vars(settings).update(more)
    return settings


@pytest.mark.parametrize("key", THEIRS)
def test_a_key_gives_the_numbers_of_peft(key):
    made = draw_projections(key, rank=3, num_in=7, num_out=5)
    assert made.left.shape == (7, 3) and made.right.shape == (3, 5)
    found = made.left[0, 0], made.left[-1, -1], made.right[0, 0], made.right[-1, -1]
    assert tuple(map(float, found)) == THEIRS[key]


def test_only_the_vectors_are_trained_and_start_at_nothing(load, vera):
    model, family = load()
    adapted = add_lora(model, vera, family=family, dtype="float32")
    trained = {
        name: each.numpy() for name, each in adapted.model.state_dict().items() if not each.stop_gradient
    }
    assert {name.rpartition(".")[2] for name in trained} == {"vera_lambda_d", "vera_lambda_b"}
    assert all((each == (0.25 if name.endswith("d") else 0)).all() for name, each in trained.items())
    assert adapted.projections.whole.right.shape == (6, max(each.size for each in trained.values()))
    parts = {
        id(each) for _, layer in adapted.model.named_sublayers() for each in getattr(layer, "projections", ())
    }
    assert len(parts) < 8, "layers share them"


def test_every_stage_makes_the_matrices_of_the_whole_model(load, vera):
    model, _ = load()
    patterns = [r".*layers\.0\..*down_proj", ".*q_proj"]
    whole = adapted_sizes(model, patterns)
    stage, _ = load()
    make_stage(stage, 2, 4, outside=["llama.embed_tokens", "lm_head"])
    assert adapted_sizes(stage, patterns) == whole


def test_a_tensor_rank_has_its_part(load, vera):
    model, family = load(num_key_value_heads=4)
    adapted = add_lora(model, vera, family=family, dtype="float32")
    config, name = model.config, "llama.layers.0.mlp.down_proj"
    whole, layer = adapted.projections.whole, model.get_sublayer(name)
    rows = layer.weight.shape[0] // 2
    layer.weight = model.create_parameter([rows, layer.weight.shape[1]])
    layer.lora_A = layer.weight  # for its type
    for rank in range(2):
        config.tensor_parallel_degree, config.tensor_parallel_rank = 2, rank
        left, right = LocalProjections(whole, config).parts_of(name, layer)
        np.testing.assert_array_equal(left.numpy(), whole.left[rank * rows : (rank + 1) * rows])
        np.testing.assert_array_equal(right.numpy(), whole.right[:, : layer.weight.shape[1]])


def test_saved_matrices_are_read_and_checked(load, vera, tmp_path):
    model, family = load()
    save_adapter(add_lora(model, vera, family=family, dtype="float32"), tmp_path)
    config = json.loads((tmp_path / "lora_config.json").read_text())
    assert (config["vera"], config["r"], config["save_projection"]) == (True, 6, True)
    kept = read_projections(tmp_path)
    assert kept is not None
    np.testing.assert_array_equal(load_lora(load()[0], tmp_path).projections.whole.left, kept.left)
    (tmp_path / "lora_config.json").write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(
        UserError, match=rf"{PROJECTIONS_FILE} has vera_A and vera_B of .*, but the layers .* need"
    ):
        load_lora(load()[0], tmp_path)
    (tmp_path / PROJECTIONS_FILE).unlink()
    with pytest.raises(UserError, match=r"does not fit this model"):
        load_lora(load()[0], tmp_path)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"r": 4, "projection_prng_key": 1.5}, "projection_prng_key 1.5"),
        ({"r": 0}, "r 0"),
        ({"r": 4, "vera_alpha": 3}, "vera_alpha 3: which this release does not know"),
    ],
)
def test_unusable_configurations_of_peft(config, fault, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA"} | config))
    (found,) = find_adapter_faults("lora_path", tmp_path)
    assert f"has {fault}" in found
