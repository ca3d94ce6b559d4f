"""The demonstration behind `make demo`: a tiny Llama learns to write advertising texts.

    python -m finetune.demo

Builds a random model, shows what it writes, fine-tunes it with llama/demo_argument.json, and shows
what it writes then. All three runs go through finetune_generation.py, as a user's would.
"""

from __future__ import annotations

from finetune.machine.command_parser import CommandParser
from finetune.machine.command_start import start_command

if __name__ == "__main__":  # until `run_command`: the imports below take a moment
    start_command()

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.machine.command_names import python_name
from finetune.models.tiny.checkpoint import build_tiny
from finetune.processes.command import run_command
from finetune.reporting.report import print_summary
from finetune.storage.files import read_json_object, read_text

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = "llama/demo_argument.json"
FOLDER = Path("checkpoints/demo")
MODEL = FOLDER / "tiny-llama"
TRAINED = FOLDER / "llama_sft"
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 1500,
    "max_length": 256,
}
_GENERATE = ("--do_train", "false", "--eval_with_do_generation", "true", "--save_generation_output", "true")
_NUM_SAMPLES = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration; the exit code of the first step that fails, or 0."""
    description = f"Trains a tiny random model on data/ and shows what it learned; writes to {FOLDER}/ alone."
    CommandParser(prog="python -m finetune.demo", description=description).parse_args(arguments)
    _step("1/4 A tiny Llama with random weights and a SentencePiece vocabulary learned from data/")
    shutil.rmtree(ROOT / FOLDER, ignore_errors=True)
    build_tiny("llama", ROOT / MODEL, **SHAPE)
    _step("2/4 What it writes before training")
    before = FOLDER / "before"
    if code := _run("--output_dir", str(before), *_GENERATE):
        return code
    _step("3/4 Fine-tuning on 3,200 samples (1 to 4 minutes on 2 cores)")
    began = time.monotonic()
    if code := _run():
        return code
    seconds = time.monotonic() - began
    _step("4/4 What it writes now")
    after = FOLDER / "after"
    if code := _run("--model_name_or_path", str(TRAINED), "--output_dir", str(after), *_GENERATE):
        return code
    _show(before, after, seconds)
    return 0


def _step(text: str) -> None:
    print(f"\n== {text}", file=sys.stderr, flush=True)


def _run(*options: str) -> int:
    command = ["finetune_generation.py", ARGUMENTS, *options]
    print(f"$ python {shlex.join(command)}", file=sys.stderr, flush=True)
    # The summary of each run would repeat what the end of the demonstration shows.
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, check=False
    ).returncode


def _show(before: Path, after: Path, seconds: float) -> None:
    trained, untrained, generated = (_results(folder) for folder in (TRAINED, before, after))
    lines = read_text(ROOT / after / "generated_output.json").splitlines()
    python = python_name()
    print_summary(
        f"A tiny model learned to write advertisements in {seconds / 60:.1f} minutes",
        metrics={
            "eval loss": f"{trained['eval_loss']:.4f}",
            "BLEU-4": f"{generated['eval_bleu4']:.4f}   (before training {untrained['eval_bleu4']:.4f})",
            "ROUGE-L": f"{generated['eval_rougel']:.4f}   (before training {untrained['eval_rougel']:.4f})",
        },
        samples=[json.loads(line) for line in lines[:_NUM_SAMPLES]],
        files={
            "loss curve": TRAINED / "loss.png",
            "log": TRAINED / "train_log.jsonl",
            "weights": TRAINED,
            "all texts": after / "generated_output.json",
        },
        next_commands={
            "train an adapter on the same model": f"{python} finetune_generation.py llama/lora_argument.json "
            f"--model_name_or_path {TRAINED} --device cpu --max_steps 20 --output_dir checkpoints/demo/llama_lora",
            "use your own data": f"{python} finetune_generation.py llama/lora_argument.json "
            "--dataset_name_or_path YOUR_FOLDER --model_name_or_path YOUR_MODEL",
            "see every setting": f"{python} finetune_generation.py --help",
        },
    )


def _results(folder: Path) -> dict[str, Any]:
    return read_json_object(ROOT / folder / "all_results.json")


if __name__ == "__main__":
    sys.exit(run_command(main))
