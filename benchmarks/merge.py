"""Merging the files of tensor-parallel ranks: time against `cp` and sync of the same files, and peak memory.

    python benchmarks/merge.py [--sizes 1,4] [--degrees 2,4] [--dtypes float32,bfloat16] [--rounds 3] [--scratch DIR]

Checkpoints with the weights of a Llama (hidden 2048, inner 5632, vocabulary 32,000, as many layers as the size needs)
are written as `paddle.save` writes them, one .pdparams per rank. `cp` of all files followed by `sync` of the copies, and
`merge_tp_params.py` as a whole process, take turns; times are medians over the rounds, the ratio is the median of the
ratios within a round. Peak memory is the highest resident size of the process (`ru_maxrss`, which counts mapped pages).
The scratch folder needs three times the largest size; it is emptied after every checkpoint.
"""

from __future__ import annotations

import argparse
import json
import pickle
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.families.family import get_family
from finetune.families.tensor_splits import find_split
from finetune.families.tiny_recipe import TinyShape
from finetune.storage.checkpoints import TensorFiles
from finetune.storage.rank_files import shard_name
from finetune.storage.writer import count_bytes

_SCRIPT = Path(__file__).resolve().parents[1] / "merge_tp_params.py"
_HIDDEN, _INNER, _VOCABULARY, _HEADS = 2048, 5632, 32_000, 16
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
# A process of its own, so that the memory of this one does not count: the peak of a child begins with its parent's.
_TIMED = """
import os, resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(code)
"""


@dataclass(frozen=True)
class Timing:
    """One run of a command.

    Attributes:
        seconds: Wall time of the whole process.
        peak_mb: Highest resident size in MiB.
    """

    seconds: float
    peak_mb: float


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="1,4", help="GB of the whole model")
    parser.add_argument("--degrees", default="2,4", help="tensor-parallel ranks")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="element types")
    parser.add_argument("--rounds", type=int, default=3, help="turns of either side")
    parser.add_argument(
        "--scratch", type=Path, help="where the checkpoints go (default: the temporary folder)"
    )
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.machine()}")
    print(
        "| GB | dtype | ranks | cp + sync, s | merge, s | ratio | peak MiB |\n|---|---|---|---|---|---|---|"
    )
    for size in map(float, args.sizes.split(",")):
        for dtype in args.dtypes.split(","):
            for degree in map(int, args.degrees.split(",")):
                with tempfile.TemporaryDirectory(prefix="merge-benchmark-", dir=args.scratch) as scratch:
                    print(_measure(Path(scratch), size, dtype, degree, rounds=args.rounds), flush=True)


def _measure(scratch: Path, size: float, dtype: str, degree: int, *, rounds: int) -> str:
    source, copy, merged = scratch / "ranks", scratch / "copy", scratch / "merged"
    num_bytes = write_checkpoint(source, int(size * 1e9), dtype, degree)
    merge = [sys.executable, str(_SCRIPT), "--model_name_or_path", str(source),
             "--output_dir", str(merged)]  # fmt: skip
    copies, merges = [], []
    for _ in range(rounds):
        copies.append(_time(["sh", "-c", f"cp -r '{source}' '{copy}' && sync '{copy}'/*"]))
        shutil.rmtree(copy)
        merges.append(_time(merge))
        stored = sum(map(count_bytes, TensorFiles(merged.glob("*.safetensors")).tensors.values()))
        assert stored >= num_bytes
        shutil.rmtree(merged)
    ratio = statistics.median(
        ours.seconds / theirs.seconds for ours, theirs in zip(merges, copies, strict=True)
    )
    return (
        f"| {num_bytes / 1e9:.2f} | {dtype} | {degree} | {_median(copies):.2f} | {_median(merges):.2f} | {ratio:.2f} | "
        f"{max(timing.peak_mb for timing in merges):.0f} |"
    )


def write_checkpoint(folder: Path, num_bytes: int, dtype: str, degree: int) -> int:
    """Writes a rank's file per tensor-parallel rank; returns the bytes of the whole model's tensors."""
    family = get_family("llama")
    item = _ITEM_BYTES[dtype]
    layer = item * (4 * _HIDDEN**2 + 3 * _HIDDEN * _INNER)
    num_layers = max(1, round((num_bytes - 2 * item * _VOCABULARY * _HIDDEN) / layer))
    shape = TinyShape(_HIDDEN, _INNER, num_layers, _HEADS, _HEADS, _VOCABULARY, 2048)
    config = family.tiny.config(shape) | {"tensor_parallel_degree": degree, "dtype": dtype}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2**15, _VOCABULARY * _HIDDEN * item // 2, np.uint16).view(
        np.float32 if item == 4 else np.uint16
    )
    specs = family.tiny.weights(shape)
    for rank in range(degree):
        state = {}
        for name, spec in specs.items():
            split = find_split(family, name, config, degree=degree)
            part = split.part_shape(spec.shape, degree) if split else spec.shape
            state[name] = (name, values[: int(np.prod(part))].reshape(part))
        with (folder / shard_name("model_state", tensor=rank, pipeline=None)).open("wb") as file:
            pickler = pickle.Pickler(file, protocol=4)
            pickler.fast = True  # each array is written out, not referred to
            pickler.dump(state)
    subprocess.run(["sync"], check=True)
    return item * sum(int(np.prod(spec.shape)) for spec in specs.values())


def _time(command: Sequence[str]) -> Timing:
    run = subprocess.run([sys.executable, "-S", "-c", _TIMED, *command], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr}")
    seconds, peak = map(float, run.stdout.split())
    return Timing(seconds, peak)


def _median(timings: Sequence[Timing]) -> float:
    return statistics.median(timing.seconds for timing in timings)


if __name__ == "__main__":
    main()
