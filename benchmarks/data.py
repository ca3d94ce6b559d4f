"""From files to packed rows: this project against PaddleNLP's path, and both against the tokenizer's own speed.

    python benchmarks/data.py [--rounds 3] [--samples 50000] [--peer-samples 5000] [--vocabulary tokenizer.model]

The samples are src/tgt lines whose lengths are log-normal, like those of instruction data (median 180, 95% below
about 900, at most 2048 tokens); their text is cut from --text, files with JSON objects. Every side is a process of
its own, so that its peak memory is its own; imports are not timed. The sides take turns; compare the ratios,
which are medians over the rounds of the ratio within a round. Processor seconds, of all threads together, are
what other work on the machine disturbs least.

ours            reads, renders, tokenizes, labels and packs (`finetune.run.data.read_data`, `pack`)
ours, cached    the same from the cache
library, list   the SentencePiece library on the same texts with 2 threads, ids as lists of Python integers
library, array  the same with ids as arrays, the fastest there is
paddlenlp       the usual conversion with LlamaTokenizer, then ZeroPaddingMapDataset with the start-end form of
                masks, which is its quickest and smallest; on --peer-samples, scaled by the tokens
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LENGTH = 2048
SOURCE_LENGTH = 1024
NUM_THREADS = 2


def main() -> None:
    """Parses the command line, makes the files and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of every side")
    parser.add_argument("--samples", type=int, default=50_000, help="lines of the data file")
    parser.add_argument("--peer-samples", type=int, default=5_000, help="lines that PaddleNLP gets")
    parser.add_argument("--vocabulary", help="a SentencePiece model; without one, 8,000 pieces are trained")
    parser.add_argument(
        "--text", nargs="*", help="files with JSON objects that text is cut from; data/train.json without one"
    )
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of {', '.join(SIDES)}")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "files":
        write_files(args, Path(args.folder))
    elif args.side:
        run_side(args.side, Path(args.folder))
    else:
        with tempfile.TemporaryDirectory() as folder:
            # Not here: a process that is started counts what its parent holds as its own peak.
            own = [sys.executable, __file__, *sys.argv[1:]]
            subprocess.run([*own, "--side", "files", "--folder", folder], check=True)
            print_table(args, Path(folder))


# ---------------------------------------------------------------- the files


def write_files(args: argparse.Namespace, folder: Path) -> None:
    """Writes train.json, its first lines as peer.json, and the folder of the tokenizer."""
    from benchmarks.packing import draw_lengths
    from finetune.models.tiny.sentencepiece_training import (
        corpus_lines,
        open_sentencepiece,
        train_sentencepiece,
    )

    sample_data = ROOT / "data" / "train.json"
    files = [Path(text) for text in args.text or [sample_data]]
    model = (
        Path(args.vocabulary).read_bytes()
        if args.vocabulary
        else train_sentencepiece(sample_data, vocab_size=8000)
    )
    processor = open_sentencepiece(model)
    texts = [line for file in files for line in corpus_lines(file)]
    random.Random(0).shuffle(texts)
    ids = [index for each in processor.encode(texts, num_threads=NUM_THREADS) for index in each]
    generator = np.random.default_rng(1)
    lengths = draw_lengths(args.samples)
    lines = []
    for length in np.maximum(lengths - 2, 2).tolist():  # BOS and EOS are added
        start = int(generator.integers(0, len(ids) - length))
        middle = start + max(1, int(length * generator.uniform(0.1, 0.5)))
        parts = {"src": ids[start:middle], "tgt": ids[middle : start + length]}
        row = {name: processor.decode(part) or "a" for name, part in parts.items()}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "train.json").write_text("".join(lines), encoding="utf-8")
    (folder / "peer.json").write_text("".join(lines[: args.peer_samples]), encoding="utf-8")
    tokenizer = folder / "model"
    tokenizer.mkdir()
    (tokenizer / "sentencepiece.bpe.model").write_bytes(model)
    (tokenizer / "config.json").write_text('{"model_type": "llama"}')
    (tokenizer / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')


# ---------------------------------------------------------------- the sides


def run_side(name: str, folder: Path) -> None:
    """Runs one side in this process and prints what it took, as JSON."""
    job = SIDES[name](folder)
    start, processor_start = time.perf_counter(), time.process_time()
    num_tokens = job()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"seconds": seconds, "processor": processor, "tokens": num_tokens, "megabytes": peak}
    print(json.dumps(figures))


def prepare_ours(folder: Path, *, cached: bool = False) -> Callable[[], int]:
    """The path of a run from its arguments to packed rows."""
    from finetune.data.packing.packing import pack
    from finetune.families.family import get_family
    from finetune.run.data import find_files, read_data
    from finetune.run.tokenizer import TokenizerPair
    from finetune.settings.arguments import parse_arguments
    from finetune.tokenizers.fast_encoder import load_fast_encoder

    settings = {
        **{"model_name_or_path": str(folder / "model"), "dataset_name_or_path": str(folder / "train.json")},
        **{"output_dir": str(folder / "out"), "do_train": True, "zero_padding": True},
        **{"src_length": SOURCE_LENGTH, "max_length": LENGTH},
        **{"data_cache": cached, "data_cache_dir": str(folder / "cache")},
    }
    (folder / "arguments.json").write_text(json.dumps(settings))
    args = parse_arguments([str(folder / "arguments.json")])
    encoder, reason = load_fast_encoder(folder / "model", get_family("llama"), num_threads=NUM_THREADS)
    assert encoder is not None, reason

    def run() -> int:
        data = read_data(args, find_files(args), TokenizerPair(None, encoder))  # type: ignore[arg-type]
        lengths: Any = data.train.lengths  # type: ignore[attr-defined]
        pack(lengths, LENGTH, seed=0)
        return int(lengths.sum()) + len(lengths)

    if cached and not (folder / "cache").exists():
        run()
    return run


def prepare_library(folder: Path, *, as_arrays: bool) -> Callable[[], int]:
    """SentencePiece alone; the texts are read before."""
    import sentencepiece

    path = str(folder / "model" / "sentencepiece.bpe.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    rows = map(json.loads, (folder / "train.json").read_text(encoding="utf-8").splitlines())
    texts = [text for row in rows for text in (row["src"], row["tgt"])]
    out_type: Any = "numpy" if as_arrays else int

    def run() -> int:
        portions = (texts[start : start + 2000] for start in range(0, len(texts), 2000))
        encoded = (processor.encode(part, out_type=out_type, num_threads=NUM_THREADS) for part in portions)
        return sum(len(ids) for part in encoded for ids in part)

    return run


def prepare_paddlenlp(folder: Path) -> Callable[[], int]:
    """Source and target tokenized one by one, joined and shifted as lists, then packed."""
    from paddlenlp.datasets import MapDataset, ZeroPaddingMapDataset
    from paddlenlp.transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(str(folder / "model"))

    def convert(row: dict[str, str]) -> dict[str, list[int]]:
        source = tokenizer(row["src"], max_length=SOURCE_LENGTH, truncation=True, truncation_side="left")
        room = LENGTH - len(source["input_ids"])
        target = tokenizer(
            row["tgt"] + tokenizer.eos_token, max_length=room, truncation=True, add_special_tokens=False
        )
        ids = source["input_ids"] + target["input_ids"]
        labels = [-100] * len(source["input_ids"]) + target["input_ids"]
        length = len(ids) - 1
        return {
            "input_ids": ids[:-1],
            "labels": labels[1:],
            "position_ids": list(range(length)),
            "attn_mask_startend_row_indices": [length] * length,
        }

    def run() -> int:
        lines = (folder / "peer.json").read_text(encoding="utf-8").splitlines()
        data = MapDataset([json.loads(line) for line in lines]).map(convert, lazy=False)
        packed = ZeroPaddingMapDataset(data, tokenizer=tokenizer, max_length=LENGTH)
        return sum(len(packed[row]["input_ids"]) for row in range(len(packed))) + len(lines)

    return run


SIDES: dict[str, Callable[[Path], Callable[[], int]]] = {
    "ours": prepare_ours,
    "cached": lambda folder: prepare_ours(folder, cached=True),
    "list": lambda folder: prepare_library(folder, as_arrays=False),
    "array": lambda folder: prepare_library(folder, as_arrays=True),
    "paddlenlp": prepare_paddlenlp,
}
LABELS = {
    "ours": "ours",
    "cached": "ours, cached",
    "list": "library, list",
    "array": "library, array",
    "paddlenlp": "paddlenlp",
}


# ---------------------------------------------------------------- the table


def measure(name: str, folder: Path) -> dict[str, float]:
    """One turn of a side."""
    command = [sys.executable, __file__, "--side", name, "--folder", str(folder)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if result.returncode:
        raise SystemExit(f"{name} failed:\n{result.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def print_table(args: argparse.Namespace, folder: Path) -> None:
    """Measures the sides in turns and prints medians."""
    names = args.sides.split(",")
    if "cached" in names:
        measure("cached", folder)  # writes the cache
    rounds = [{name: measure(name, folder) for name in names} for _ in range(args.rounds)]
    total = rounds[0][names[0]]["tokens"]
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"{args.samples:,} samples, {total / 1e6:.1f}M tokens, max_length {LENGTH}; medians of {args.rounds} rounds; "
        f"paddlenlp on {args.peer_samples:,} samples, scaled"
    )
    base = names[0]
    print(
        f"{'':<16}{'seconds':>9}{'fastest':>9}{'M tokens/s':>12}{'x ' + base:>9}"
        f"{'processor s':>13}{'x ' + base:>9}{'peak MB':>9}"
    )
    for name in names:
        row = f"{LABELS[name]:<16}"
        for key in ("seconds", "processor"):
            seconds = [scaled(turn, name, key, total) for turn in rounds]
            bases = [scaled(turn, base, key, total) for turn in rounds]
            ratio = statistics.median(own / other for own, other in zip(seconds, bases, strict=True))
            middle = statistics.median(seconds)
            if key == "seconds":
                row += f"{middle:>9.2f}{min(seconds):>9.2f}{total / 1e6 / middle:>12.2f}{ratio:>9.2f}"
            else:
                row += f"{middle:>13.2f}{ratio:>9.2f}"
        print(f"{row}{statistics.median(turn[name]['megabytes'] for turn in rounds):>9.0f}")


def scaled(turn: dict[str, dict[str, float]], name: str, key: str, total: float) -> float:
    """Seconds for all tokens."""
    figures = turn[name]
    return figures[key] * (total / figures["tokens"] if name == "paddlenlp" else 1)


if __name__ == "__main__":
    main()
