"""The recorded TrainingArguments must be those of the installed PaddleNLP."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.settings.model import ModelArguments
from finetune.settings.records import MODEL_CONFIG
from finetune.settings.registry import TRAINING_ARGUMENTS_FILE, known_aliases, known_settings, read_rows

ROOT = Path(__file__).resolve().parents[2]
RECORDED = json.loads(TRAINING_ARGUMENTS_FILE.read_text(encoding="utf-8"))["settings"]
# Our own view of these model options: null leaves the checkpoint's configuration alone.
NOT_FROM_PADDLENLP = {
    "fuse_attention_qkv",
    "fuse_attention_ffn",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
}

READ_INSTALLED = """
import json
from record_training_arguments import read_installed
from paddlenlp.transformers.configuration_utils import LlmMetaConfig
from paddlenlp.trainer import TrainingArguments
import paddlenlp
import sys
sys.path.insert(0, "..")
from finetune.settings.arguments import parse_arguments
words = "--model_name_or_path a/b --dataset_name_or_path c --output_dir out --do_train --do_eval --device cpu"
built = []
for more in ("--evaluation_strategy steps --save_strategy steps --load_best_model_at_end --logging_steps 50", ""):
    arguments = TrainingArguments(**parse_arguments([*words.split(), *more.split()]).training_kwargs())
    built.append({
        "evaluation_strategy": arguments.evaluation_strategy.value,
        "eval_steps": arguments.eval_steps,
        "metric": arguments.metric_for_best_model,
        "greater_is_better": arguments.greater_is_better,
        "report_to": arguments.report_to,
    })
print("RESULT" + json.dumps({
    "version": paddlenlp.__version__,
    "settings": read_installed(),
    "built": built,
    "config": {name: default for name, _, default, _ in LlmMetaConfig._get_all_meta()},
}))
"""


@pytest.fixture(scope="module")
def installed():
    completed = subprocess.run(
        [sys.executable, "-c", READ_INSTALLED],
        cwd=ROOT / "tools",
        capture_output=True,
        text=True,
        timeout=240,
    )
    results = [line for line in completed.stdout.splitlines() if line.startswith("RESULT")]
    assert results, completed.stderr[-2000:]
    return json.loads(results[0].removeprefix("RESULT"))


def test_names_types_defaults_and_choices_are_the_installed_ones(installed):
    without_help = [{key: value for key, value in entry.items() if key != "help"} for entry in RECORDED]
    assert without_help == installed["settings"]


def test_recorded_version_is_the_installed_one(installed):
    assert (
        json.loads(TRAINING_ARGUMENTS_FILE.read_text(encoding="utf-8"))["paddlenlp"] == installed["version"]
    )


def test_every_option_of_the_model_configuration_can_be_set(installed):
    missing = installed["config"].keys() - known_settings().keys()
    assert missing == {"tensor_parallel_rank"}


def test_defaults_of_model_options_are_paddlenlps(installed):
    differing = {
        name
        for name, setting in known_settings().items()
        if setting.group == "model" and MODEL_CONFIG in setting.readers and name not in NOT_FROM_PADDLENLP
        if setting.default != installed["config"][name]
    }
    # PaddleNLP's fine-tuning script sets this one to false itself.
    assert differing == {"tensor_parallel_output"}


def test_every_setting_has_a_help_text():
    assert [entry["name"] for entry in RECORDED if not entry["help"].strip()] == []
    assert [setting.name for setting in known_settings().values() if not setting.help.strip()] == []


def test_rows_and_aliases_are_of_settings_that_exist():
    rows = read_rows("training_records.json")
    recorded = {entry["name"] for entry in RECORDED}
    assert rows["common"].keys() <= recorded and rows["others"].keys() <= recorded
    assert not rows["common"].keys() & rows["others"].keys()
    assert not known_aliases().keys() & known_settings().keys()


def test_group_names_do_not_collide():
    fields = [field.name for field in dataclasses.fields(ModelArguments)]
    recorded = [entry["name"] for entry in RECORDED]
    assert not set(fields) & set(recorded)


def test_paddlenlps_class_takes_the_resolved_values(installed):
    with_best_model, at_the_end = installed["built"]
    assert with_best_model == {
        "evaluation_strategy": "steps",
        "eval_steps": 50,
        "metric": "loss",
        "greater_is_better": False,
        "report_to": [],
    }
    assert at_the_end["evaluation_strategy"] == "no"
