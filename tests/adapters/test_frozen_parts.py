"""Which parameters are trained, by what people write, and what is said where that fits nothing."""

from __future__ import annotations

import pytest

from finetune.adapters.frozen_parts import PartChoice, check_choice, choose_trained
from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.storage.checkpoints import TensorFiles
from tests.conftest import FAST, run_entry, write_arguments

LLAMA = get_family("llama")
SIZES = {
    "llama.embed_tokens.weight": 40,
    **{
        f"llama.layers.{number}.{part}": size
        for number in (0, 1, 10)
        for part, size in (("self_attn.q_proj.weight", 10), ("mlp.up_proj.weight", 8), ("input_layernorm.weight", 2))
    },
    "llama.norm.weight": 2,
    "lm_head.weight": 40,
}  # fmt: skip


def trained(*, is_tied: bool = False, **choice) -> set[str]:
    sizes = {name: size for name, size in SIZES.items() if not (is_tied and name == "lm_head.weight")}
    return choose_trained(PartChoice(**choice), sizes, LLAMA, is_tied=is_tied)


def frozen(**choice) -> set[str]:
    return set(SIZES) - trained(**choice)


def layer(number: int) -> set[str]:
    return {name for name in SIZES if f"layers.{number}." in name}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"num_layers": 1}, layer(0)),
        ({"num_layers": 2}, layer(0) | layer(1)),
        ({"frozen": ("model.layers.1",)}, layer(1)),  # not layer 10
        ({"frozen": ("llama.layers.1.",)}, layer(1)),
        ({"frozen": ("lm_head", "norm")}, {"lm_head.weight", "llama.norm.weight"}),
        ({"frozen": (r"^model\.layers\.(0|1)\.",)}, layer(0) | layer(1)),
        ({"frozen": (r"layers\.1\d",)}, layer(10)),
        ({"frozen": ("layers",), "trainable": ("layers.0",)}, layer(1) | layer(10)),
        (
            {"ratio": 0.5},
            {"llama.embed_tokens.weight"} | layer(0) | {"llama.layers.1.self_attn.q_proj.weight"},
        ),
        ({"ratio": 1.0, "trainable": ("lm_head",)}, set(SIZES) - {"lm_head.weight"}),
        ({"ratio": 0.2}, set()),  # the embedding alone is more
    ],
)
def test_what_is_frozen(choice, expected):
    assert frozen(**choice) == expected


def test_given_alone_only_these_are_trained():
    assert trained(trainable=("self_attn",)) == {name for name in SIZES if "self_attn" in name}


def test_a_tied_output_layer_is_the_embedding():
    assert trained(is_tied=True, trainable=("lm_head",)) == {"llama.embed_tokens.weight"}
    assert "llama.embed_tokens.weight" not in trained(is_tied=True, frozen=("lm_head.weight",))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"frozen": ("embed_token",)}, r"freeze_parameters: no parameter .*'embed_token'; did you mean embed_tokens"),
        ({"trainable": ("q_proj", "w1")}, r"trainable_parameters: no parameter .*'w1'; .*there are: .*q_proj"),
        ({"frozen": ("(",)}, "no regular expression"),
        ({"ratio": 1.0}, "nothing is left to train"),
        ({"num_layers": 11, "frozen": ("embed_tokens", "norm", "lm_head")}, "nothing is left to train"),
    ],
)  # fmt: skip
def test_what_is_refused(choice, message):
    with pytest.raises(UserError, match=message):
        trained(**choice)


def test_the_number_of_layers_is_told():
    with pytest.raises(UserError, match="freeze_layers is 3, but this model has 2 layers"):
        check_choice(PartChoice(num_layers=3), LLAMA, {"num_hidden_layers": 2})


@pytest.fixture
def arguments(tiny_llama, small_data, tmp_path):
    def write(**settings):
        base = FAST | {
            "model_name_or_path": str(tiny_llama), "dataset_name_or_path": str(small_data),
            "output_dir": str(tmp_path / "out"), "max_steps": 2, "save_strategy": "steps", "save_steps": 1,
        }  # fmt: skip
        return write_arguments(tmp_path / "arguments.json", **base | settings)

    return write


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_parameters": ["q_prj"]}, "did you mean q_proj"),
        ({"freeze_layers": 9}, "this model has 2 layers"),
        ({"freeze_parameters_ratio": 1}, "nothing is left to train"),
        ({"freeze_layers": 1, "lora": True}, "freeze_layers is for full fine-tuning, but lora is true"),
        ({"trainable_parameters": ["x"], "prefix_tuning": True}, "but prefix_tuning is true"),
        ({"modules_to_save": ["lm_head"]}, "name what alone is trained in trainable_parameters"),
        ({"finetuning_type": "freeze"}, "full with trainable_parameters"),
    ],
)
def test_faults_end_with_2(arguments, capsys, settings, message):
    assert run_entry(arguments(**settings)) == 2
    assert message in capsys.readouterr().err


def test_only_what_is_trained_has_state_and_changes(arguments, tiny_llama, tmp_path, capsys):
    """The run tells the count; another choice is not continued with."""
    part = {"freeze_layers": 2, "freeze_parameters": ["embed_tokens"], "modules_to_save": ["embed_tokens"]}
    assert run_entry(arguments(**part)) == 0
    assert "Model: 65,184 parameters, 38,432 of them trained (58.96%)" in capsys.readouterr().err
    before, after = (TensorFiles([folder / "model.safetensors"]) for folder in (tiny_llama, tmp_path / "out"))
    changed = {name for name in before.names if (before.read(name) != after.read(name)).any()}
    assert changed == {"llama.embed_tokens.weight", "lm_head.weight", "llama.norm.weight"}
    state = TensorFiles([tmp_path / "out" / "checkpoint-1" / "optimizer.safetensors"])
    assert {name.rpartition("/")[0] for name in state.names} == changed

    (tmp_path / "out" / "trainer_state.json").unlink()
    assert run_entry(arguments(**part | {"freeze_layers": 1})) == 2
    assert "holds a run with freeze_layers 2, and this one has 1" in capsys.readouterr().err
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    assert run_entry(arguments(output_dir=str(tmp_path / "new"), resume_from_checkpoint=checkpoint)) == 2
    assert "trained other parameters than this one (3 tensors, here 21)" in capsys.readouterr().err


def test_ms_swift_and_axolotl_names(arguments, tmp_path):
    from finetune.settings.arguments import parse_arguments

    args = parse_arguments(
        [str(arguments(freeze_parameters_ratio=1, additional_trainable_parameters=["lm_head"]))]
    )
    assert (args.model.freeze_parameters_ratio, args.model.trainable_parameters) == (1.0, ["lm_head"])
    args = parse_arguments([str(arguments(unfrozen_parameters=["^lm_head.weight$"]))])
    assert args.model.trainable_parameters == ["^lm_head.weight$"]
