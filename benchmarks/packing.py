"""Packing: how much room stays empty and how long it takes, against other libraries' algorithms.

    python benchmarks/packing.py [--rounds 3] [--samples 50000] [--capacities 2048,4096] [--sides ours,...]

Lengths are drawn from a log-normal distribution like that of instruction data (median 180, 95% below about
900, at most 2048 tokens). All sides get the same lengths and take turns, round after round, in this process;
compare the ratios, which are medians over the rounds of the ratio within a round. A side whose package is
not installed is left out. Nothing but the named functions of the packages is loaded, so `pip install
--no-deps trl llamafactory binpacking` is enough; the last is what ms-swift packs with.

"of 1000" packs in portions of a thousand samples, as the libraries do unless told otherwise; "at once" all
samples together. The time is that of choosing the bins, except that TRL and PaddleNLP join the tokens in the
same function (bytes here, so that it costs little).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.data.batches.collate import collate_packed
from finetune.data.packing.packing import PackedSamples, pack

PORTION = 1000
PADDED_ROW = 4096
NUM_COLLATED = 30


@dataclass(frozen=True)
class Side:
    """One way to pack.

    Attributes:
        package: The distribution it comes from; None for this project.
        label: For the table.
        run: Lengths and capacity to the number of bins.
        prepare: Turns the lengths into what `run` takes; not timed.
    """

    package: str | None
    label: str
    run: Callable[..., int]
    prepare: Callable[[np.ndarray], object] = lambda lengths: lengths


def main() -> None:
    """Parses the command line and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of every side")
    parser.add_argument("--samples", type=int, default=50_000, help="lengths to pack")
    parser.add_argument("--capacities", default="2048,4096", help="tokens of a bin")
    quick = [name for name in SIDES if name != "swift"]  # which takes a minute
    parser.add_argument("--sides", default=",".join(quick), help=f"of {', '.join(SIDES)}")
    args = parser.parse_args()
    sides = {name: SIDES[name] for name in args.sides.split(",")}
    for name, side in list(sides.items()):
        if side.package and not importlib.util.find_spec(MODULES[side.package]):
            print(f"{side.package} is not installed: {name} is left out.")
            del sides[name]
    lengths = draw_lengths(args.samples)
    print_conditions(args, lengths, sides)
    for capacity in map(int, args.capacities.split(",")):
        print_packing(lengths, capacity, sides, args.rounds)
    print_collating(lengths)


def draw_lengths(num_samples: int, seed: int = 0) -> np.ndarray:
    """Tokens of each sample: int64 [samples]; what falls outside 1 to 2048 is drawn again."""
    generator = np.random.default_rng(seed)
    kept = np.empty(0, dtype=np.int64)
    while len(kept) < num_samples:
        drawn = np.exp(generator.normal(np.log(180), 0.98, num_samples)).round().astype(np.int64)
        kept = np.concatenate([kept, drawn[(drawn >= 1) & (drawn <= 2048)]])
    return kept[:num_samples]


# ---------------------------------------------------------------- the sides


def portions(lengths: np.ndarray) -> Iterator[np.ndarray]:
    return (lengths[start : start + PORTION] for start in range(0, len(lengths), PORTION))


def load_file(module: str, *parts: str) -> ModuleType:
    """One file of an installed package, without running the package's own imports."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]).joinpath(*parts)
    file_spec = importlib.util.spec_from_file_location("_".join((module, path.stem)), path)
    assert file_spec is not None and file_spec.loader is not None
    loaded = importlib.util.module_from_spec(file_spec)
    sys.modules[loaded.__name__] = loaded
    file_spec.loader.exec_module(loaded)
    return loaded


def llamafactory(lengths: np.ndarray, capacity: int) -> int:
    greedy_knapsack = load_file("llamafactory", "data", "processor", "processor_utils.py").greedy_knapsack
    return len(greedy_knapsack(lengths.tolist(), capacity))


def llamafactory_portions(lengths: np.ndarray, capacity: int) -> int:
    return sum(llamafactory(portion, capacity) for portion in portions(lengths))


def to_table(lengths: np.ndarray) -> object:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = pa.array(np.zeros(offsets[-1], dtype=np.int8))
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), tokens)})


def trl(table, capacity: int) -> int:
    return len(load_file("trl", "data_utils.py")._pack_bfd(table, capacity))


def trl_portions(table, capacity: int) -> int:
    pack_bfd = load_file("trl", "data_utils.py")._pack_bfd
    return sum(
        len(pack_bfd(table.slice(start, PORTION), capacity)) for start in range(0, len(table), PORTION)
    )


def swift(lengths: np.ndarray, capacity: int) -> int:
    import binpacking

    return len(binpacking.to_constant_volume(list(enumerate(lengths.tolist())), capacity, weight_pos=1))


def swift_portions(lengths: np.ndarray, capacity: int) -> int:
    """Portions as ms-swift takes them: the last bin of each joins the next."""
    import binpacking

    num_bins = 0
    waiting: list[tuple[int, int]] = []
    for portion in portions(lengths):
        waiting += enumerate(portion.tolist())
        *closed, waiting = binpacking.to_constant_volume(waiting, capacity, weight_pos=1)
        num_bins += len(closed)
    return num_bins + bool(waiting)


def to_records(lengths: np.ndarray) -> list[dict[str, bytes]]:
    names = ("input_ids", "labels", "attn_mask_startend_row_indices")  # the last keeps dense masks out
    return [dict.fromkeys(names, bytes(length)) for length in lengths.tolist()]


def paddlenlp(records: list[dict[str, bytes]], capacity: int, greedy: bool = False) -> int:
    from paddlenlp.datasets.zero_padding_dataset import ZeroPaddingMapDataset

    return len(ZeroPaddingMapDataset(records, None, capacity, greedy_zero_padding=greedy))


SIDES = {
    "ours": Side(None, "this project, at once", lambda x, capacity: len(pack(x, capacity, seed=0))),
    "ours_10000": Side(
        None, "this project, of 10,000", lambda x, capacity: len(pack(x, capacity, seed=0, window=10_000))
    ),
    "ours_1000": Side(
        None, "this project, of 1000", lambda x, capacity: len(pack(x, capacity, seed=0, window=PORTION))
    ),
    "paddlenlp": Side("paddlenlp", "PaddleNLP", paddlenlp, to_records),
    "paddlenlp_greedy": Side(
        "paddlenlp", "PaddleNLP, greedy", lambda x, capacity: paddlenlp(x, capacity, greedy=True), to_records
    ),
    "llamafactory_1000": Side("llamafactory", "LLaMA-Factory, of 1000", llamafactory_portions),
    "llamafactory": Side("llamafactory", "LLaMA-Factory, at once", llamafactory),
    "trl_1000": Side("trl", "TRL bfd, of 1000", trl_portions, to_table),
    "trl": Side("trl", "TRL bfd, at once", trl, to_table),
    "swift_1000": Side("binpacking", "ms-swift, of 1000", swift_portions),
    "swift": Side("binpacking", "ms-swift, at once", swift),
}
MODULES = {name: name for name in ("llamafactory", "trl", "binpacking", "paddlenlp")}


# ---------------------------------------------------------------- the tables


def print_conditions(args: argparse.Namespace, lengths: np.ndarray, sides: dict[str, Side]) -> None:
    """What the numbers depend on."""
    packages = ["numpy", *sorted({side.package for side in sides.values() if side.package})]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores{load}")
    print(
        f"{len(lengths):,} samples, {lengths.sum():,} tokens: median {np.median(lengths):.0f}, "
        f"95% below {np.percentile(lengths, 95):.0f}, at most {lengths.max()}; medians of {args.rounds} rounds"
    )


def print_packing(lengths: np.ndarray, capacity: int, sides: dict[str, Side], num_rounds: int) -> None:
    """Bins, efficiency and time of each side; ratios are taken within each round first."""
    inputs = {side.prepare: side.prepare(lengths) for side in sides.values()}
    num_bins: dict[str, int] = {}
    rounds = []
    for side in sides.values():  # modules load outside the timing
        side.run(side.prepare(lengths[:100]), capacity)
    for _ in range(num_rounds):
        turn = {}
        for name, side in sides.items():
            start = time.perf_counter()
            num_bins[name] = side.run(inputs[side.prepare], capacity)
            turn[name] = time.perf_counter() - start
        rounds.append(turn)
    print(f"\ncapacity {capacity}: {-(-lengths.sum() // capacity):,} bins would be full")
    base = next(iter(sides))
    print(f"{'':<26}{'bins':>8}{'efficiency':>12}{'seconds':>10}{'fastest':>10}{'x ' + base:>8}")
    for name, side in sides.items():
        efficiency = lengths.sum() / (num_bins[name] * capacity)
        ratio = statistics.median(turn[name] / turn[base] for turn in rounds)
        seconds = [turn[name] for turn in rounds]
        row = f"{side.label:<26}{num_bins[name]:>8,}{efficiency:>12.3%}"
        print(f"{row}{statistics.median(seconds):>10.3f}{min(seconds):>10.3f}{ratio:>8.1f}")


def print_collating(lengths: np.ndarray) -> None:
    """Milliseconds to collate one row, padded to full length, with each kind of mask."""
    packing = pack(lengths, PADDED_ROW, seed=0)
    tokens = np.zeros(int(lengths.max()), dtype=np.int32)
    samples = [SimpleNamespace(input_ids=tokens[:n], labels=tokens[:n]) for n in lengths.tolist()]
    rows = PackedSamples(samples, packing)  # type: ignore[arg-type]
    bins = [rows[number] for number in range(NUM_COLLATED)]
    print(f"\ncollating one row of {PADDED_ROW}, {NUM_COLLATED} of them: median (fastest) in ms")
    for mask in ("block", "start_end", None):
        milliseconds = []
        for row in bins:
            start = time.perf_counter()
            collate_packed([row], pad_token_id=0, row_length=PADDED_ROW, mask=mask)  # type: ignore[arg-type]
            milliseconds.append((time.perf_counter() - start) * 1e3)
        print(f"mask {mask!s:<12}{statistics.median(milliseconds):>8.2f}  ({min(milliseconds):.2f})")


if __name__ == "__main__":
    main()
