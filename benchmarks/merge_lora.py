"""Merging a LoRA adapter on all linear layers: time against `cp` and sync of the base, against peft, and peak memory.

    python benchmarks/merge_lora.py [--sizes 0.875,4] [--dtypes bfloat16,float32] [--rank 16] [--rounds 3]
                                    [--forms paddle,hf] [--peft] [--scratch DIR]

The base has the weights of a Llama (hidden 2048, inner 5632, vocabulary 32,000, as many layers as the size needs). `cp`
and sync of its files, `merge_lora_params.py`, and with --peft the script at the end of this file (`from_pretrained`,
`merge_and_unload`, `save_pretrained`; needs PyTorch, transformers and peft) take turns as whole processes. Times are
medians over the rounds, the ratio is the median of (time - 1 s of start-up) / (cp + sync) within a round. Peak memory
is the highest resident size of a process (`ru_maxrss`). The scratch folder needs three times the largest size.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.families.family import get_family
from finetune.families.tiny_recipe import TinyShape
from finetune.models.hf_names import is_turned, to_hugging_face
from finetune.storage.writer import ComputedTensor, Layout, write_tensors

_SCRIPT = Path(__file__).resolve().parents[1] / "merge_lora_params.py"
_HIDDEN, _INNER, _VOCABULARY, _HEADS = 2048, 5632, 32_000, 16
# A process of its own, so that the memory of this one does not count: the peak of a child begins with its parent's.
_TIMED = """
import resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(code)
"""
_DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}
_STARTUP_SECONDS = 1.0
_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, torch_dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


@dataclass(frozen=True)
class Timing:
    """Wall time of a process in seconds, and its highest resident size in MiB."""

    seconds: float
    peak_mb: float


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="0.875,4", help="GB of the base")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="element types")
    parser.add_argument("--forms", default="paddle,hf", help="forms of the base")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every side")
    parser.add_argument("--peft", action="store_true", help="measure peft, too (forms: hf)")
    parser.add_argument("--scratch", type=Path, help="where the files go (default: the temporary folder)")
    args = parser.parse_args()
    print(
        f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}, rank {args.rank}"
    )
    print("| GB | dtype | base | cp + sync, s | merge, s | ratio | peak MiB | peft, s | peft peak MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in map(float, args.sizes.split(",")):
        for dtype in args.dtypes.split(","):
            for form in args.forms.split(","):
                with tempfile.TemporaryDirectory(prefix="merge-benchmark-", dir=args.scratch) as scratch:
                    print(_measure(Path(scratch), size, dtype, form, args=args), flush=True)


def _measure(scratch: Path, size: float, dtype: str, form: str, *, args: argparse.Namespace) -> str:
    base, adapter, out = scratch / "base", scratch / "adapter", scratch / "out"
    num_bytes = write_base(base, int(size * 1e9), dtype, hugging_face=form == "hf")
    write_adapter(adapter, base, rank=args.rank)
    commands: dict[str, list[str]] = {
        "copy": ["sh", "-c", f"cp -r '{base}' '{out}' && sync '{out}'/*"],
        "merge": [sys.executable, str(_SCRIPT), "--model_name_or_path", str(base),
                  "--lora_path", str(adapter), "--merge_model_path", str(out)],
    }  # fmt: skip
    if args.peft and form == "hf":
        export = [*commands["merge"][:-1], str(scratch / "peft"), "--save_format", "peft"]
        subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
        commands["peft"] = [sys.executable, "-c", _PEFT, str(base), str(scratch / "peft"), str(out)]
    timings: dict[str, list[Timing]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            subprocess.run(["sync"], check=True)
            timings[name].append(time_command(command))
            shutil.rmtree(out)
    ratio = statistics.median(
        (ours.seconds - _STARTUP_SECONDS) / theirs.seconds
        for ours, theirs in zip(timings["merge"], timings["copy"], strict=True)
    )
    theirs = (
        f"{_median(timings['peft']):.2f} | {_peak(timings['peft']):.0f}" if "peft" in timings else "- | -"
    )
    return (
        f"| {num_bytes / 1e9:.2f} | {dtype} | {form} | {_median(timings['copy']):.2f} | "
        f"{_median(timings['merge']):.2f} | {ratio:.2f} | {_peak(timings['merge']):.0f} | {theirs} |"
    )


def write_base(folder: Path, num_bytes: int, dtype: str, *, hugging_face: bool) -> int:
    """Writes a Llama of about that size; returns the bytes of its tensors."""
    family, element = get_family("llama"), _DTYPES[dtype]
    layer = element.itemsize * (4 * _HIDDEN**2 + 3 * _HIDDEN * _INNER)
    num_layers = max(1, round((num_bytes - 2 * element.itemsize * _VOCABULARY * _HIDDEN) / layer))
    shape = TinyShape(_HIDDEN, _INNER, num_layers, _HEADS, _HEADS, _VOCABULARY, 2048)
    config = family.tiny.config(shape) | {"torch_dtype" if hugging_face else "dtype": dtype}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = []
    for name, spec in family.tiny.weights(shape).items():
        sizes = spec.shape
        if hugging_face:
            sizes = sizes[::-1] if is_turned(name, sizes, family, tied=False) else sizes
            name = to_hugging_face(name, family)
        tensors.append(_random_tensor(name, sizes, element))
    write_tensors(folder, tensors, Layout(format="pt" if hugging_face else "np"))
    return sum(int(np.prod(tensor.shape)) for tensor in tensors) * element.itemsize


def write_adapter(folder: Path, base: Path, *, rank: int) -> None:
    """Writes an adapter of this project on all linear layers of the base."""
    family = get_family("llama")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    shape = TinyShape(_HIDDEN, _INNER, config["num_hidden_layers"], _HEADS, _HEADS, _VOCABULARY, 2048)
    folder.mkdir()
    settings = {"r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": str(base)}
    (folder / "lora_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tensors = []
    for name, spec in family.tiny.weights(shape).items():
        if name.endswith("_proj.weight"):
            layer = name.removesuffix(".weight")
            tensors.append(_random_tensor(f"{layer}.lora_A", (spec.shape[0], rank), _DTYPES["float32"]))
            tensors.append(_random_tensor(f"{layer}.lora_B", (rank, spec.shape[1]), _DTYPES["float32"]))
    layout = Layout("peft_model", always_numbered=True, index_facts=(("type", "lora"),))
    write_tensors(folder, tensors, layout)


def _random_tensor(name: str, shape: tuple[int, ...], dtype: np.dtype) -> ComputedTensor:
    """Values of about 0.02, in blocks of rows."""

    def blocks() -> Iterator[np.ndarray]:
        generator = np.random.default_rng(len(name))
        step = max(1, 2**20 // int(np.prod(shape[1:])))
        for begin in range(0, shape[0], step):
            values = (
                generator.standard_normal((min(step, shape[0] - begin), *shape[1:]), dtype=np.float32) * 0.02
            )
            yield (values.view(np.uint32) >> 16).astype("<u2") if dtype == np.uint16 else values

    return ComputedTensor(name, dtype, shape, blocks)


def time_command(command: Sequence[str]) -> Timing:
    """Runs a command as a process."""
    run = subprocess.run([sys.executable, "-S", "-c", _TIMED, *command], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr}")
    seconds, peak = map(float, run.stdout.split()[-2:])
    return Timing(seconds, peak)


def _median(timings: Sequence[Timing]) -> float:
    return statistics.median(timing.seconds for timing in timings)


def _peak(timings: Sequence[Timing]) -> float:
    return max(timing.peak_mb for timing in timings)


if __name__ == "__main__":
    main()
