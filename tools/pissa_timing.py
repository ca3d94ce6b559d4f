"""Times the search for the leading singular vectors of a weight beside decomposing the whole.

python tools/pissa_timing.py [side] [rank]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from finetune.adapters import leading_vectors


def make_weights(side: int) -> dict[str, np.ndarray]:
    """Random numbers, and the same with 64 directions whose sizes fall in front of them."""
    random = np.random.default_rng(0)
    flat = 0.02 * random.standard_normal((side, side)).astype(np.float32)
    left, right = (random.standard_normal(shape).astype(np.float32) for shape in ((side, 64), (64, side)))
    sizes = np.exp(-np.arange(64) / 20).astype(np.float32)
    return {"falling": flat + 0.02 * (left * sizes) @ right, "random": flat}


def seconds_of(function: Callable[[], object]) -> float:
    """Processor seconds that a call takes."""
    began = time.process_time()
    function()
    return time.process_time() - began


def main() -> None:
    """Prints a line for each kind of weight."""
    side, rank = (int(word) for word in [*sys.argv[1:], *("4096", "16")[len(sys.argv) - 1 :]])
    for name, weight in make_weights(side).items():
        search = seconds_of(lambda weight=weight: leading_vectors.leading_vectors(weight, rank))
        whole = seconds_of(lambda weight=weight: leading_vectors._decomposed(weight, rank))
        print(f"{name}: search {search:.2f} s, decomposition of the whole {whole:.2f} s")


if __name__ == "__main__":
    main()
