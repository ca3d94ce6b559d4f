"""One training step on CPU: this project's settings, Paddle's defaults, and transformers on PyTorch.

    python benchmarks/cpu_step.py [--rounds 5] [--steps 6] [--models small,large] [--sides ours,...]

Every side runs in a process of its own (the settings are read once, at load) on the same padded batch:
forward, backward, gradient clipping and AdamW in float32. The sides take turns, round after round, so
that whatever else the machine does falls on all of them; compare the ratios, which are medians over the
rounds of the ratio within a round, rather than the absolute numbers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

IGNORED_LABEL = -100
NUM_WARMUP_STEPS = 3
SIDES = {
    "ours": "settings of finetune.machine.processor, and the CPU layers",
    "settings": "settings of finetune.machine.processor alone",
    "defaults": "Paddle's defaults",
    "pytorch": "transformers on PyTorch's defaults",
}


@dataclass(frozen=True)
class Model:
    """Size of a Llama and of its batch."""

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    batch_size: int
    length: int = 256
    num_layers: int = 4

    def config(self) -> dict[str, Any]:
        """Arguments that both libraries' LlamaConfig understand."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.hidden_size // 64,
            "num_key_value_heads": self.hidden_size // 64,
            "max_position_embeddings": 1024,
            "use_cache": False,
        }

    def batch(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, mask and labels [batch, length]: rows of half to full length, loss on the last two thirds."""
        rng = np.random.default_rng(0)
        lengths = rng.integers(self.length // 2, self.length + 1, self.batch_size)
        lengths[0] = self.length
        positions = np.arange(self.length)[None]
        mask = positions < lengths[:, None]
        ids = rng.integers(5, self.vocab_size, mask.shape)
        labels = np.where(mask & (positions >= lengths[:, None] // 3), ids, IGNORED_LABEL)
        return ids, mask.astype(np.int64), labels


MODELS = {"small": Model(256, 512, 256, batch_size=8), "large": Model(512, 1024, 16800, batch_size=4)}


def main() -> None:
    """Parses the command line and runs either one side or the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of every side")
    parser.add_argument("--steps", type=int, default=6, help="timed steps per turn")
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of {', '.join(SIDES)}")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(run_side(args.worker, MODELS[args.models], args.steps)))
        return
    sides = args.sides.split(",")
    if "pytorch" in sides and not (
        importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
    ):
        print("PyTorch or transformers is not installed (make parity installs both): that side is left out.")
        sides.remove("pytorch")
    if "ours" in sides and not importlib.util.find_spec("finetune.families.llama.cpu_layers"):
        print(
            "finetune/families/llama/cpu_layers.py is not there: `ours` is left out, `settings` stands for it."
        )
        sides.remove("ours")
    print_conditions(args)
    for name in args.models.split(","):
        rounds = [{side: start_side(side, name, args.steps) for side in sides} for _ in range(args.rounds)]
        print_table(name, rounds, sides)


def start_side(side: str, model: str, num_steps: int) -> dict[str, float]:
    """Runs one side in a new process without the caller's own thread and flag settings."""
    own = ("OMP_", "MKL_", "FLAGS_", "KMP_", "MALLOC_", "FINETUNE_CPU_SETTINGS")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    command = [sys.executable, __file__, "--worker", side, "--models", model, "--steps", str(num_steps)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{side} failed:\n{result.stderr[-3000:]}")
    turn = json.loads(result.stdout.splitlines()[-1])
    print(f"  {model} {side}: {turn['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
    return turn


def run_side(side: str, model: Model, num_steps: int) -> dict[str, float]:
    """Builds the model, warms up, and returns the median seconds of a step and the tokens in it."""
    step = build_pytorch(model) if side == "pytorch" else build_paddle(model, side)
    for _ in range(NUM_WARMUP_STEPS):
        step()
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    _, mask, _ = model.batch()
    return {"tokens_per_second": float(mask.sum()) / statistics.median(seconds)}


def build_paddle(model: Model, side: str) -> Callable[[], float]:
    """A function that does one step with PaddleNLP's Llama and returns the loss."""
    from finetune.machine import processor

    if side != "defaults":
        processor.configure_processor()
        processor.keep_freed_memory()
    import paddle
    from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

    if side == "ours":
        from finetune.families.llama import cpu_layers

        cpu_layers.install_llama()
    network = LlamaForCausalLM(LlamaConfig(**model.config()))
    network.train()
    optimizer = paddle.optimizer.AdamW(
        1e-4,
        parameters=network.parameters(),
        weight_decay=0.01,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0),
    )
    ids, mask, labels = (paddle.to_tensor(array) for array in model.batch())

    def step() -> float:
        loss = network(input_ids=ids, attention_mask=mask, labels=labels, return_dict=True).loss
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        return float(loss)

    return step


def build_pytorch(model: Model) -> Callable[[], float]:
    """The same with transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    network = LlamaForCausalLM(LlamaConfig(**model.config()))
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.01)
    ids, mask, labels = (torch.tensor(array) for array in model.batch())

    def step() -> float:
        loss = network(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def print_conditions(args: argparse.Namespace) -> None:
    """What the numbers depend on."""
    from finetune.machine.processor import configure_processor

    versions = []
    for package in ("paddlepaddle", "paddlenlp", "torch", "transformers"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    print(configure_processor({}))
    print(", ".join(versions))
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{args.rounds} rounds of {args.steps} steps after {NUM_WARMUP_STEPS} of warm-up{load}; float32")


def print_table(name: str, rounds: list[dict[str, dict[str, float]]], sides: list[str]) -> None:
    """Medians over the rounds; ratios are taken within each round first."""
    model = MODELS[name]
    _, mask, labels = model.batch()
    print(f"\n{name}: {json.dumps(asdict(model))}")
    print(f"{mask.sum()} tokens and {(labels != IGNORED_LABEL).sum()} labels in {mask.size} positions")
    bases = [side for side in ("defaults", "pytorch") if side in sides]
    print("  ".join([f"{'side':<10}", "tokens/s", *(f"x {base:<9}" for base in bases)]))
    for side in sides:
        speeds = [turn[side]["tokens_per_second"] for turn in rounds]
        ratios = [
            statistics.median(
                turn[side]["tokens_per_second"] / turn[base]["tokens_per_second"] for turn in rounds
            )
            for base in bases
        ]
        row = [f"{side:<10}", f"{statistics.median(speeds):8.0f}", *(f"{ratio:<11.2f}" for ratio in ratios)]
        print("  ".join(row) + f"  {SIDES[side]}")


if __name__ == "__main__":
    main()
