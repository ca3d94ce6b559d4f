"""Names and values of other tools: read where they mean the same, answered where they do not."""

import json
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.settings.arguments import parse_arguments
from finetune.settings.parsing import describe_unknown
from finetune.settings.registry import foreign_settings, known_aliases, known_settings
from finetune.settings.synonyms import known_methods, known_synonyms
from tests.settings.argument_files import parse

pytestmark = pytest.mark.usefixtures("in_a_folder_with_data")


def faults_of(settings=None, *words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(settings, *words)
    return list(caught.value.faults)


def value_of(name: str, arguments):
    return getattr(getattr(arguments, known_settings()[name].group), name)


SAME = [
    # key and value of another tool, our setting and its value
    ("cutoff_len", 512, "max_length", 512),
    ("finetuning_type", "lora", "lora", True),
    ("finetuning_type", "full", "lora", False),
    ("train_type", "lora", "lora", True),
    ("lora_target", "q_proj,v_proj", "lora_target_modules", ["q_proj,v_proj"]),
    ("target_modules", ["q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
    ("gradient_checkpointing", True, "recompute", True),
    ("disable_gradient_checkpointing", True, "recompute", False),
    ("eval_strategy", "epoch", "evaluation_strategy", "epoch"),
    ("use_rslora", False, "rslora", False),
    ("mask_history", True, "train_on", "last"),
    ("loss_scale", "last_round", "train_on", "last"),
    ("truncation_strategy", "delete", "truncation", "drop"),
    ("val_size", 0.1, "validation_split", 0.1),
    ("val_size", 0, "validation_split", None),
    ("split_dataset_ratio", 0.0, "validation_split", None),
    ("neat_packing", True, "zero_padding", True),
    ("optim", "adamw_torch", "optim", "adamw"),
    ("flash_attn", "sdpa", "use_flash_attention", False),
    ("do_sample", False, "top_k", 1),
    ("top_k", -1, "top_k", 0),
    ("max_train_samples", -1, "max_train_samples", None),
    ("train_dataset_sample", -1, "max_train_samples", None),
    ("train_dataset_sample", 100, "max_train_samples", 100),
    ("save_total_limit", -1, "save_total_limit", None),
    ("model_name", ["小桨", "Paddy Wheel"], "model_name", "小桨 Paddy Wheel"),
    ("model_author", ["某人"], "model_author", "某人"),
    ("lr", 0.01, "learning_rate", 0.01),
    ("val_dataset", "data", "eval_dataset", "data"),
    ("use_cpu", True, "device", "cpu"),
]


@pytest.mark.parametrize(("key", "value", "name", "expected"), SAME)
def test_what_means_the_same_is_read(key, value, name, expected):
    arguments = parse({key: value})
    assert value_of(name, arguments) == expected


@pytest.mark.parametrize(("key", "value", "name", "expected"), SAME)
def test_it_is_read_on_the_command_line_too(key, value, name, expected):
    words = (
        value if isinstance(value, list) else [json.dumps(value) if isinstance(value, bool) else str(value)]
    )
    assert value_of(name, parse(None, f"--{key}", *words)) == expected


def test_one_line_says_what_was_read():
    lines = parse({"cutoff_len": 512, "finetuning_type": "lora", "lora_r": 4}).warnings
    assert lines[0] == (
        "names of other tools are read: cutoff_len as max_length 512; finetuning_type as lora true; "
        "lora_r as lora_rank 4"
    )
    assert not any("other tools" in line for line in parse({"max_length": 512, "top_k": 3}).warnings)


def test_the_command_line_wins_over_the_file_under_any_name():
    assert parse({"cutoff_len": 512}, "--max_length", "64").data.max_length == 64
    assert parse({"max_length": 512}, "--cutoff_len", "64").data.max_length == 64


def test_two_names_with_two_values_are_named():
    assert faults_of({"max_length": 512, "cutoff_len": 64})[0] == (
        "max_length and cutoff_len are one setting, but in args.json they are 512 and 64: keep one of them"
    )
    assert parse({"max_length": 512, "cutoff_len": 512}).data.max_length == 512


@pytest.mark.parametrize("key", known_synonyms())
def test_null_counts_as_not_given(key):
    assert parse({key: None}).to_json() == parse().to_json()


INSTEAD = {
    "deepspeed": ("ds_z2.json", "--sharding stage2"),
    "fsdp": ("full_shard", "sharding stage3"),
    "quantization_bit": (3, "llm.int8"),
    "load_in_4bit": (True, "weight_double_quant"),
    "tgt_length": (512, "remove it, and set max_length"),
    "num_beams": (4, "top_k"),
    "packing": (True, "zero_padding"),
    "template": ("qwen", "chat_template"),
    "per_device_batch": (4, "per_device_train_batch_size"),
    "batch_size": (4, "per_device_train_batch_size"),
    "max_samples": (100, "max_train_samples"),
    "torch_dtype": ("bfloat16", "bf16"),
    "finetuning_type": ("freeze", "lora or full"),
    "train_on_prompt": (True, "no loss"),
    "truncation_strategy": ("left", "truncation"),
    "eval_step": (100, "eval_steps"),
    "label_smoothing_factor": (0.1, "cross entropy"),
    "eval_on_start": (True, "do_train false and do_eval true"),
    "push_to_hub": (True, "upload it"),
    "auto_find_batch_size": (True, "per_device_train_batch_size"),
}


@pytest.mark.parametrize("key", INSTEAD)
def test_what_means_something_else_is_answered(key):
    value, remedy = INSTEAD[key]
    faults = faults_of({key: value})
    assert len(faults) == 1
    assert faults[0].startswith(f"{key} is {json.dumps(value)} in args.json: ")
    assert remedy in faults[0]


METHODS = [
    ({"process_reward": True}, "a process reward model"),
    ({"input_dir": "./data", "max_seq_length": 4096, "min_learning_rate": 3e-6}, "pre-training"),
    ({"stage": "pt", "cutoff_len": 128}, "pre-training"),
    ({"actor_model_name_or_path": "a", "train_datasets": "b", "kl_coeff": 0.02}, "PPO or GRPO"),
    ({"max_query_len": 512, "group_size": 4}, "embeddings"),
]


@pytest.mark.parametrize(("settings", "method"), METHODS)
def test_files_of_other_methods_are_recognised(settings, method):
    faults = faults_of(settings)  # the rest of their settings is not named one by one
    assert len(faults) == 1 and faults[0].startswith(f"these are settings of {method} ("), faults


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("modell", '"model"'),
        ("zero_paddin", '"zero_padding"'),
        ("deepspeeds", '"deepspeed"'),
        ("seeds", '"seed"'),
    ],
)
def test_suggestions_are_near(key, hint):
    assert f"did you mean {hint}?" in describe_unknown(key, "in args.json")


@pytest.mark.parametrize("key", ["modality", "depth", "speed_up", "zero"])
def test_what_is_far_gets_no_suggestion(key):
    assert "did you mean" not in describe_unknown(key, "in args.json")


def test_every_row_of_the_table_leads_to_settings_that_exist():
    for synonym in known_synonyms().values():
        settings = [name for values in synonym.values.values() for name in values]
        assert {*settings, *([synonym.setting] if synonym.setting else [])} <= known_settings().keys(), (
            synonym
        )
        assert synonym.setting or synonym.values or synonym.instead, synonym
        assert bool(synonym.instead) == bool(synonym.instead_zh), synonym
        is_ours = synonym.name in known_settings()
        assert is_ours == (not synonym.setting and not synonym.instead), synonym
        assert synonym.name not in foreign_settings() and synonym.name not in known_aliases(), synonym
        for values in synonym.values.values():  # what they stand for is accepted by the settings themselves
            for name, value in values.items():
                assert value is None or not [*known_settings()[name].find_faults(value)]
    assert all(method.instead and method.instead_zh and method.needs for method in known_methods())


def test_names_in_the_wrong_order_are_answered():
    fault = faults_of({"model_name": ["Paddy", "小桨"]})[0]
    assert fault.startswith('model_name is ["Paddy", "小桨"] in args.json: one name, or a Chinese one')


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('{"seed": 1, // the seed\n"lora": true}', "JSON has no comments"),
        ('{"seed": 1,}', "remove the comma after the last entry"),
        ('{"no_recompute_layers": [1, 2,]}', "remove the comma after the last entry"),
        ("{'seed': 1}", "double quotes"),
        ('{"lora": True}', "write true for True"),
        ('{"seed": None}', "write null for None"),
        ('{"seed": 1\n"lora": true}', "a comma is missing"),
    ],
)
def test_what_json_does_not_allow_is_explained(text, hint):
    Path("args.json").write_text(text)
    with pytest.raises(UserError) as caught:
        parse_arguments(["args.json"])
    assert "not valid JSON" in caught.value.faults[0] and hint in caught.value.faults[0]


def test_no_steps_at_all_are_refused():
    assert faults_of({"max_steps": 0})[0].startswith("max_steps is 0: give the number of optimizer steps, -1")
