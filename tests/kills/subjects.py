"""What is killed: trainings of every kind and layout, merges, an export, a prediction and the chat server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.checkpoints.folder import list_checkpoints, newest_valid_checkpoint, step_of
from finetune.run.reference import REFERENCE_FILE
from tests.distributed.layouts import LAYOUTS, METHODS, ONE, VARIATIONS, Bench, LayoutCase
from tests.distributed.preference_runs import build_preferences
from tests.distributed.server_runs import Kill, Run
from tests.kills.chat_server import MOMENTS, ChatServer, find_interpreter
from tests.kills.chat_server import NAME as CHAT_SERVER

NUM_STEPS = 8
SAVE_STEPS = 2
_LENGTH: dict[str, Any] = {
    "max_steps": NUM_STEPS, "warmup_steps": 2, "evaluation_strategy": "no", "save_strategy": "steps",
    "save_steps": SAVE_STEPS, "save_total_limit": 2, "num_train_epochs": 3,
}  # fmt: skip
_LOG = "train_log.jsonl"
_CHANGING = frozenset({_LOG, ".lock", "all_results.json", "arguments.json", "loss.png", ".trained.json"})
"""Files with times or paths in them; of the log the figures are compared."""
_FIGURES = ("step", "kind", "loss", "grad_norm", "learning_rate", "num_tokens", "num_label_tokens", "loss_scale",
            "eval_loss", "eval_perplexity", "eval_accuracy", "rewards_chosen", "rewards_rejected", "rewards_accuracy",
            "eval_rewards_margin", "eval_rewards_accuracy")  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """Something that is started, killed and started again until it is done.

    Attributes:
        name: In the table.
        world: Number of processes.
        moments: Patterns of names whose appearance is a moment of their own.
        start: Starts it into an output, with a kill or without.
        contents: What the output holds, to be compared with that of an uninterrupted one; digits, not times.
        is_training: Whether it saves on the way and answers a signal by saving.
        is_server: Whether it runs until it is told to end, which is then a good end.
    """

    name: str
    world: int
    moments: Sequence[str]
    start: Callable[[Path, Kill | None], Run]
    contents: Callable[[Path], dict[str, str]]
    is_training: bool = False
    is_server: bool = False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def folder_contents(folder: Path) -> dict[str, str]:
    """Hash of every file by its path; names that stand there are part of it."""
    return {
        path.relative_to(folder).as_posix(): _digest(path) for path in folder.rglob("*") if path.is_file()
    }


def run_contents(folder: Path) -> dict[str, str]:
    """Hashes of weights, optimizer and schedule, and the figures of the log.

    Which checkpoint stands beside the last one depends on signals, after which a run saves; how many stand does not.
    """
    found = {"checkpoints": str(len(list(folder.glob("*checkpoint-*"))))}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith("checkpoint-") and not name.startswith(f"checkpoint-{NUM_STEPS}/"):
            continue
        has_times = path.name in _CHANGING or path.name in ("manifest.json", "data_position.json")
        found[name] = "" if has_times else _digest(path)
    records = [json.loads(line) for line in (folder / _LOG).read_text(encoding="utf-8").splitlines()]
    found["figures"] = json.dumps([{key: record.get(key) for key in _FIGURES} for record in records])
    return found


def num_logged(folder: Path) -> int:
    """The last step of a run's log; 0 without one."""
    path = folder / _LOG
    steps = [0]
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:  # cut off by the kill
            continue
    return max(steps)


def num_saved(folder: Path) -> int:
    """The step of the newest valid checkpoint; 0 without one."""
    found = newest_valid_checkpoint(folder, lambda _: None) if list_checkpoints(folder) else None
    return step_of(found) if found else 0


_OTHER = "another model"
"""Stands for a folder with the weights of a training."""

TRAININGS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "sft": ("sft", "padded", "one", {"do_eval": True}),
    "lora": ("lora", "padded", "one", {"do_eval": True}),
    "prefix": ("pt", "padded", "one", {}),
    "packed": ("sft", "packed", "one", {"do_eval": True}),
    "lazy": ("sft", "lazy", "one", {}),
    "lazy packed": ("lora", "lazy packed", "one", {}),
    "bfloat16 O2": (
        "sft",
        "padded",
        "one",
        {"bf16": True, "fp16_opt_level": "O2", "rehearse_half_precision": True},
    ),
    "float16 O2": (
        "lora",
        "padded",
        "one",
        {"fp16": True, "fp16_opt_level": "O2", "rehearse_half_precision": True},
    ),
    "dp2": ("sft", "padded", "dp2", {"do_eval": True}),
    "tp2": ("sft", "packed", "tp2", {}),
    "pp2": ("sft", "padded", "pp2", {}),
    "sharding stage 1": ("sft", "padded", "sharding2 stage1", {}),
    "sharding stage 2": ("sft", "packed", "sharding2 stage2", {}),
    "sharding stage 3": ("sft", "padded", "sharding2 stage3", {}),
    "virtual stages": ("lora", "padded", "pp2 virtual2", {}),
    "tp2 x pp2": ("sft", "padded", "tp2 x pp2", {"do_eval": True}),
    "pp2 x sharding stage 1": ("sft", "packed", "pp2 x sharding2", {}),
    "file per rank": ("sft", "padded", "tp2", {"unified_checkpoint": False}),
    "lazy, dp2": ("sft", "lazy", "dp2", {}),
    "QLoRA": ("lora", "packed", "one", {"weight_quantize_algo": "nf4", "weight_double_quant": True}),
    "QLoRA, tp2": ("lora", "padded", "tp2", {"weight_quantize_algo": "llm.int8", "do_eval": True}),
    "DPO": ("lora", "padded", "one", {"loss_type": "sigmoid", "do_eval": True}),
    "KTO": ("sft", "packed", "one", {"loss_type": "kto", "do_eval": True}),
    "DPO against a folder": (
        "sft",
        "padded",
        "one",
        {"loss_type": "sigmoid", "do_eval": True, "reference_model": _OTHER},
    ),
    "DPO, dp2": ("lora", "packed", "dp2", {"loss_type": "sigmoid", "do_eval": True}),
}
"""By name: method, variation of the data, layout, further settings."""


def training(bench: Bench, name: str) -> Subject:
    """A training of this name."""
    method, variation, layout, more = TRAININGS[name]
    case: LayoutCase = ONE if layout == "one" else LAYOUTS[layout]
    settings = (
        bench.settings("llama", method, variation) | case.arguments() | {"do_eval": False} | _LENGTH | more
    )
    assert variation in VARIATIONS and method in METHODS
    settings |= _preference_settings(bench, settings)

    def start(output: Path, kill: Kill | None) -> Run:
        return bench.server.run(settings, case.world, folder=output, kill=kill)

    moments = (
        *([f".{REFERENCE_FILE}.tmp", REFERENCE_FILE] if "loss_type" in settings else []),
        _LOG,
        "tmp-checkpoint-*",
        "checkpoint-*",
        "tmp-final-*",
        "trainer_state.json",
        "all_results.json",
        "loss.png",
    )
    return Subject(name, case.world, moments, start, run_contents, is_training=True)


def _preference_settings(bench: Bench, settings: dict[str, Any]) -> dict[str, Any]:
    """What a training on preferences has otherwise: its data, and a reference of its own where it asks for one."""
    if "loss_type" not in settings:
        return {}
    # A prompt with both its answers takes more room; nothing of the noise of supervised training.
    changed = {"dataset_name_or_path": str(build_preferences(bench.folder / "preferences")), "neftune": False}
    changed |= {"src_length": 48, "max_length": 112}
    if settings.get("reference_model") == _OTHER:
        other = bench.folder / "reference"
        if not other.exists():
            training(bench, "sft").start(other, None).check()
        changed |= {"reference_model": str(other)}
    return changed


def script(bench: Bench, name: str, sources: Path) -> Subject:
    """A merge, an export or a prediction; what it works on is made once."""
    lora = _source(bench, "lora", sources / "lora")
    base = bench.model("llama")
    data = bench.data() / "dev.json"
    commands: dict[str, tuple[str, Callable[[Path], list[object]]]] = {
        "merge of an adapter": (
            "merge_lora_params",
            lambda out: ["--model_name_or_path", base, "--lora_path", lora, "--merge_model_path", out, "--device", "cpu"],
        ),
        "merge of ranks": (
            "merge_tp_params",
            lambda out: ["--model_name_or_path", _source(bench, "file per rank", sources / "ranks"), "--output_dir", out],
        ),
        "export": (
            "export_model",
            lambda out: ["--model_name_or_path", base, "--output_path", out, "--device", "cpu"],
        ),
        "prediction": (
            "predict_generation",
            lambda out: ["--model_name_or_path", base, "--data_file", data, "--output_file", out, "--batch_size", 1,
                         "--max_new_tokens", 12, "--device", "cpu"],
        ),
    }  # fmt: skip
    command, words = commands[name]

    def start(output: Path, kill: Kill | None) -> Run:
        return bench.server.run_script(command, words(output), output, kill=kill)

    def contents(output: Path) -> dict[str, str]:
        found = {"": _digest(output)} if output.is_file() else folder_contents(output)
        return found | {"beside it": json.dumps(sorted(path.name for path in output.parent.iterdir()))}

    moments = ("../.out.lock", "../.out.incomplete", "../.out.incomplete/*", "../out.partial", "../out")
    return Subject(name, 1, moments, start, contents)


def server(bench: Bench, sources: Path) -> Subject:
    """The chat server, for which there must be an interpreter."""
    python = find_interpreter()
    assert python is not None
    lora = _source(bench, "lora", sources / "lora")
    chat = ChatServer(python, bench.model("llama"), lora, sources / "chat")
    return Subject(CHAT_SERVER, 1, MOMENTS, chat.start, chat.contents, is_server=True)


SCRIPTS = ("merge of an adapter", "merge of ranks", "export", "prediction")


def _source(bench: Bench, name: str, folder: Path) -> Path:
    """A finished training; of ranks, its last checkpoint."""
    if not folder.exists():
        training(bench, name).start(folder, None).check()
    return folder if name == "lora" else folder / f"checkpoint-{NUM_STEPS}"
