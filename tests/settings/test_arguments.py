"""What parsed arguments hold: defaults, what goes out again, help."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.processes.layout import Layout
from finetune.settings.arguments import parse_arguments
from finetune.settings.registry import known_settings
from tests.settings.argument_files import VALID, parse

pytestmark = pytest.mark.usefixtures("in_a_folder_with_data")
ROOT = Path(__file__).resolve().parents[2]
BEST = {"load_best_model_at_end": True, "evaluation_strategy": "epoch", "save_strategy": "epoch"}


# Defaults


DOCUMENTED_DEFAULTS = {
    "model": {
        "tokenizer_name_or_path": None,
        "use_flash_attention": False,
        "lora": False,
        "lora_path": None,
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "lora_target_modules": None,
        "prefix_tuning": False,
        "prefix_path": None,
        "num_prefix_tokens": 128,
        "neftune": False,
        "neftune_noise_alpha": 5.0,
        "from_aistudio": False,
        "save_to_aistudio": False,
        "aistudio_repo_id": None,
        "aistudio_repo_private": True,
        "aistudio_repo_license": "Apache License 2.0",
        "aistudio_token": None,
    },
    "data": {
        "task_name": None,
        "intokens": False,
        "zero_padding": False,
        "src_length": 1024,
        "max_length": 2048,
        "eval_with_do_generation": False,
        "save_generation_output": False,
        "lazy": False,
        "pad_to_multiple_of": None,
        "chat_template": None,
    },
    "generation": {"top_k": 1, "top_p": 1.0, "max_new_tokens": None, "temperature": 1.0},
    "training": {"learning_rate": 5e-5, "device": "cpu", "report_to": [], "disable_tqdm": None, "seed": 42},
}


@pytest.mark.parametrize("group", DOCUMENTED_DEFAULTS)
def test_defaults(group):
    parsed = getattr(parse(), group)
    assert {name: getattr(parsed, name) for name in DOCUMENTED_DEFAULTS[group]} == DOCUMENTED_DEFAULTS[group]


def test_every_recorded_training_setting_is_an_attribute():
    training = vars(parse().training)
    assert training.keys() == {s.name for s in known_settings().values() if s.group == "training"} | {
        "sharding_degree"
    }


def test_given_lists_what_was_set_under_its_name_here():
    arguments = parse({"intokens": False, "lora_path": None}, "--seed", "7")
    assert arguments.given == {*VALID, "zero_padding", "seed"}


def test_two_parses_share_no_list():
    first = parse()
    first.training.report_to.append("visualdl")
    assert parse().training.report_to == []


# What goes out again


def test_written_arguments_parse_to_the_same_values():
    settings = {**BEST, "lora": True, "bf16": True, "metric_for_best_model": "ppl", "report_to": ["visualdl"]}
    first = parse(
        {
            **settings,
            "skip_data_intervals": [[1, 2]],
            "evaluation_strategy": "steps",
            "save_strategy": "steps",
        }
    )
    Path("arguments.json").write_text(json.dumps(first.to_json()))
    second = parse_arguments(["arguments.json"])
    for group in ("model", "data", "alignment", "generation", "quant", "training"):
        assert getattr(second, group) == getattr(first, group)
    # What was turned off for the CPU is written as off, so it is not said again.
    assert second.warnings == tuple(line for line in first.warnings if "turned off" not in line)
    assert second.to_json() == first.to_json()


def test_secrets_are_not_written():
    arguments = parse({"aistudio_token": "hush", "wandb_api_key": "hush"})
    assert arguments.model.aistudio_token == "hush"
    assert arguments.training_kwargs()["wandb_api_key"] == "hush"
    assert "hush" not in json.dumps(arguments.to_json())


def test_training_kwargs_hold_what_was_given_or_resolved():
    kwargs = parse({"max_steps": 5, "lora": True, "logging_steps": None}).training_kwargs()
    assert kwargs == {
        "do_train": True,
        "output_dir": "out",
        "max_steps": 5,
        "report_to": [],
        "device": "cpu",
        "load_best_model_at_end": False,
    }


def test_model_config_kwargs():
    kwargs = parse({"recompute": True, "recompute_granularity": "core_attn"}).model_config_kwargs()
    assert kwargs["recompute"] is True and kwargs["recompute_granularity"] == "core_attn"
    assert kwargs["tensor_parallel_degree"] == 1 and kwargs["tensor_parallel_output"] is False
    assert "fuse_attention_qkv" not in kwargs


PARALLEL = {
    "tensor_parallel_degree": 2,
    "pipeline_parallel_degree": 2,
    "virtual_pp_degree": 2,
    "sharding": "stage2",
    "sequence_parallel": True,
    "unified_checkpoint": True,
    "pipeline_parallel_config": "disable_p2p_cache_shape",
    "sharding_parallel_config": "enable_stage2_overlap",
    "hybrid_parallel_topo_order": "sharding_first",
}


def test_paddlenlp_hears_of_no_parallelism_but_the_files_do(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "8")
    arguments = parse({**PARALLEL, "max_steps": 5})
    kwargs = arguments.training_kwargs()
    assert kwargs["max_steps"] == 5
    assert kwargs.keys().isdisjoint(PARALLEL)
    written = arguments.to_json()
    assert {name: written[name] for name in PARALLEL} == PARALLEL


def test_the_model_hears_of_its_slice_only(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "8")
    arguments = parse({**PARALLEL, "recompute": True})
    kwargs = arguments.model_config_kwargs(Layout(pipeline=2, sharding=2, tensor=2), rank=5)
    assert (kwargs["tensor_parallel_degree"], kwargs["tensor_parallel_rank"]) == (2, 1)
    assert kwargs["tensor_parallel_output"] is True and kwargs["sequence_parallel"] is True
    assert (kwargs["pipeline_parallel_degree"], kwargs["virtual_pp_degree"]) == (1, 1)
    assert kwargs["recompute"] is True
    alone = arguments.model_config_kwargs()
    assert (alone["tensor_parallel_degree"], alone["tensor_parallel_rank"]) == (1, 0)
    assert alone["sequence_parallel"] is False


# Help, and how fast all of this answers


def test_help_shows_groups_and_defaults_in_80_columns(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    order = [
        text.index(title) for title in ("usage:", "Model and method:", "Data:", "Training (", "Generation:")
    ]
    assert order == sorted(order)
    for line in ("--lora_rank [8]", "--max_length [2048]", "--learning_rate [5e-05]", "--top_p [1.0]"):
        assert line in text
    assert "adam_beta1" not in text
    assert f"all {len(known_settings())} settings" in text


@pytest.mark.parametrize("words", [["--help", "all"], ["--help-all"], ["args.json", "--help_all"]])
def test_help_all_shows_everything(capsys, words):
    with pytest.raises(SystemExit):
        parse_arguments(words)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert [name for name in known_settings() if f"--{name} [" not in text] == []


ANSWER = """
import sys
from finetune.settings.arguments import parse_arguments
from finetune.errors import UserError
try:
    parse_arguments()
except (UserError, SystemExit):
    heavy = {"paddle", "paddlenlp", "numpy", "torch", "transformers", "datasets"} & sys.modules.keys()
    sys.exit(f"imported {heavy}" if heavy else 0)
sys.exit("no fault")
"""


def seconds_of(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=60)
    return time.perf_counter() - started


@pytest.mark.parametrize("words", [["--help"], ["--help-all"], ["--lora_rnk", "3", "--device", "gpu"]])
def test_answers_at_once_without_heavy_imports(words):
    bare = min(seconds_of("-c", "pass") for _ in range(2))
    taken = min(seconds_of("-c", ANSWER, *words) for _ in range(2))
    assert taken < max(1.0, 20 * bare)
