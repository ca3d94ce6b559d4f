"""What is said of a run's adapter before data are read: other settings than its own, faulty patterns."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.run.adapter import adapt, check_adapter

RESOLVED = SimpleNamespace(
    family=get_family("llama"), config={"model_type": "llama", "num_hidden_layers": 2}, stored_format=None
)
MODEL = {
    "lora": True, "lora_path": None, "lora_rank": 8, "lora_alpha": 16.0, "rslora": False, "pissa": False, "use_dora": False,
    "vera": False, "lokr": False, "weight_quantize_algo": None,
    "lora_target_modules": None, "prefix_tuning": False, "prefix_path": None, "modules_to_save": None,
    "freeze_layers": 0, "freeze_parameters_ratio": 0.0, "freeze_parameters": None, "trainable_parameters": None,
}  # fmt: skip

TRAINING = SimpleNamespace(do_train=True)


def check(*given: str, training=TRAINING, **model):
    args = SimpleNamespace(model=SimpleNamespace(**MODEL | model), given=frozenset(given), training=training)
    return check_adapter(args, RESOLVED)


def write(folder, name, **content):
    folder.mkdir()
    (folder / name).write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("lora_config.json", {"r": 4, "lora_alpha": 16, "rslora": True}),
        ("adapter_config.json", {"r": 4, "lora_alpha": 16.0, "use_rslora": True}),
    ],
)
def test_given_settings_that_the_adapter_has_otherwise(name, theirs, tmp_path):
    path = write(tmp_path / "a", name, **theirs)
    layers = [f"base_model.model.model.layers.{number}.self_attn.q_proj" for number in (0, 1)]
    matrices = {
        f"{layer}.lora_{name}.weight": np.zeros((4, 4), np.float32) for layer in layers for name in "AB"
    }
    save_file(matrices, tmp_path / "a" / "adapter_model.safetensors")
    lines = check(
        "lora_rank",
        "lora_alpha",
        "rslora",
        "lora_target_modules",
        lora_path=path,
        lora_target_modules=["all"],
    )
    assert len(lines) == 3
    assert "lora_rank is 8, but the adapter" in lines[0] and "was trained with 4" in lines[0]
    assert "rslora is false" in lines[1] and "true" in lines[1]
    assert "lora_target_modules is not used" in lines[2]
    assert check("learning_rate", lora_path=path) == [], "nothing was asked for"


@pytest.mark.parametrize(
    ("theirs", "asked", "said"),
    [
        ({"lora_use_mixer": True}, {"lora_use_mixer": False}, "lora_use_mixer is false, but the adapter"),
        ({"lora_bias": "all"}, {"lora_bias": "none"}, "lora_bias is none, but the adapter"),
        ({}, {"lora_bias": "lora_only"}, "lora_bias is lora_only, but the adapter"),
        ({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 16}}, "rank_pattern is not used"),
        ({}, {"alpha_pattern": {"q_proj": 16}}, "alpha_pattern is not used"),
        ({}, {"init_lora_weights": "gaussian"}, "init_lora_weights is not used"),
        (
            {"vera": True, "projection_prng_key": 3},
            {"projection_prng_key": 4, "vera": True},
            "projection_prng_key is 4",
        ),
        ({"lokr": True, "lokr_factor": 4}, {"lokr_factor": 8, "lokr": True}, "lokr_factor is 8"),
    ],
)
def test_whatever_the_adapter_decides_is_told(theirs, asked, said, tmp_path):
    path = write(tmp_path / "a", "lora_config.json", r=8, lora_alpha=16.0, **theirs)
    (tmp_path / "a" / "peft_model.safetensors").touch()
    lines = check(*asked, lora_path=path, **asked)
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize("word", ["lora_only", "vera_only"])
def test_names_of_peft_for_what_the_adapter_decides(word, tmp_path):
    path = write(tmp_path / "a", "adapter_config.json", r=8, lora_alpha=16, bias=word)
    save_file(
        {
            f"base_model.model.model.layers.{number}.self_attn.q_proj.lora_{name}.weight": np.zeros(
                (8, 8), np.float32
            )
            for number in (0, 1)
            for name in "AB"
        },
        tmp_path / "a" / "adapter_model.safetensors",
    )
    assert check("lora_bias", lora_path=path, lora_bias="lora_only") == []
    assert "trained with lora_only" in check("lora_bias", lora_path=path, lora_bias="none")[0]


@pytest.mark.parametrize("start", [{"pissa": True}, {"init_lora_weights": "olora"}])
def test_an_adapter_whose_start_leaves_the_weights_over_packed_ones(start, tmp_path):
    path = write(tmp_path / "a", "lora_config.json", r=8, lora_alpha=16.0, **start)
    (tmp_path / "a" / "peft_model.safetensors").touch()
    assert check(lora_path=path) == []
    packed = {"weight_quantize_algo": "nf4", "weight_blocksize": 64, "weight_double_quant": False,
              "weight_double_quant_block_size": 256}  # fmt: skip
    with pytest.raises(UserError, match="which changes the weights that it starts from"):
        check(lora_path=path, **packed)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ["lora_path is not given, so the model alone is evaluated"]),
        ({"lora": False, "prefix_tuning": True}, ["prefix_path is not given", "random prefix"]),
        ({"lora": False}, []),
    ],
)
def test_an_evaluation_without_the_adapter(settings, said, tmp_path):
    training = SimpleNamespace(do_train=False, output_dir=str(tmp_path))
    lines = check(training=training, **settings)
    assert len(lines) == bool(said) and all(text in lines[0] for text in said)
    (tmp_path / "lora_config.json").touch()
    assert not said or str(tmp_path) in check(training=training, **settings)[0]


def test_the_type_of_the_matrices_that_go_on(tmp_path, monkeypatch):
    """`lora_dtype` counts for an adapter that is trained further as for a new one."""
    path = write(tmp_path / "a", "lora_config.json", r=8, lora_alpha=16.0)
    asked = []
    monkeypatch.setattr(
        "finetune.adapters.lora.load_lora", lambda *_, **named: asked.append(named["overrides"])
    )
    for wanted in (None, "float32"):
        args = SimpleNamespace(
            model=SimpleNamespace(
                **MODEL | {"lora_path": path, "lora_dtype": wanted, "model_name_or_path": "base"}
            ),
            training=SimpleNamespace(fp16_opt_level="O2", fp16=False, bf16=True),
            given=frozenset(),
        )
        adapt(None, args, RESOLVED, None)
    assert [each["dtype"] for each in asked] == ["bfloat16", "float32"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"lora_target_modules": ["q_porj"]}, "no module matches 'q_porj'"),
        ({"lora_target_modules": ["(q_proj"]}, "is no regular expression"),
        ({"lora_path": "nowhere"}, "lora_path nowhere is no folder"),
        (
            {"lora": False, "prefix_tuning": True, "prefix_path": "nowhere"},
            "prefix_path nowhere is no folder",
        ),
    ],
)
def test_faults(model, message):
    with pytest.raises(UserError, match=message):
        check(**model)


def test_patterns_of_any_layout_pass():
    assert check(lora_target_modules=["q_proj,k_proj,v_proj", ".*qkv_proj.*", "all", "default"]) == []


def test_an_adapter_that_is_more_than_lora(tmp_path):
    path = write(tmp_path / "a", "adapter_config.json", r=4, lora_alpha=16, alora_invocation_tokens=[5, 6])
    with pytest.raises(
        UserError, match=r"has alora_invocation_tokens \[5, 6\]: it works from the invocation tokens"
    ):
        check(lora_path=path)
    assert check(lora_path=path, lora=False) == []
