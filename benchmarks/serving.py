"""The server: answers of several clients together against one after the other.

    python benchmarks/serving.py [--models tiny,30m] [--clients 1,4,16] [--rounds 3] [--requests 3] [--modes dynamic,static]

Every client asks `/v1/completions` again and again: 32 token ids of its own, greedy, 64 new tokens. The server runs as
the command `serve` in a process of its own, once with rows that join and leave (`--max_batch_size 16`) and once with
one answer at a time (`--max_batch_size 1`); both are up together and asked in turn. Tokens/s are of all clients together,
by the clock and per second of the server's processor time, which a busy machine disturbs less; both are medians over the
rounds, ratios medians of the ratio within a round. Both sides must give the same texts, or the script stops.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NUM_NEW_TOKENS = 64
PROMPT_LENGTH = 32
BATCH_SIZES = (16, 1)
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "30m": {
        "hidden_size": 512,
        "num_layers": 8,
        "num_heads": 8,
        "vocab_size": 8000,
        "intermediate_size": 1408,
        "max_length": 512,
    },
}


def main() -> None:
    """Builds, exports, serves and measures every combination."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--modes", default="dynamic,static", help="of dynamic, static")
    parser.add_argument("--clients", default="1,4,16", help="numbers of clients")
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of every side, after one that does not count"
    )
    parser.add_argument("--requests", type=int, default=3, help="requests of every client in a turn")
    args = parser.parse_args()
    print(f"{'':<24}|{'tokens/s':^28}|{'tokens per processor second':^28}")
    print(f"{'model':<7}{'mode':<9}{'clients':<8}" + 2 * f"|{'together':>9}{'alone':>8}{'ratio':>8}   ")
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            models = build(name, Path(folder), modes=args.modes.split(","))
            for mode, model in models.items():
                measure(
                    name,
                    mode,
                    model,
                    counts=[int(each) for each in args.clients.split(",")],
                    rounds=args.rounds,
                    requests=args.requests,
                )


def build(name: str, folder: Path, *, modes: list[str]) -> dict[str, Path]:
    """The model, and its export."""
    from finetune.machine.processor import configure_processor

    configure_processor()
    from finetune.machine.quiet import silence_libraries
    from finetune.models.tiny.checkpoint import build_tiny

    silence_libraries()
    models = {"dynamic": build_tiny("llama", folder / "model", **MODELS[name])}
    if "static" in modes:
        from finetune.models.resolve import resolve_model
        from finetune.serving.export.options import ExportOptions
        from finetune.serving.export.run import export

        options = ExportOptions(model_name_or_path=str(models["dynamic"]), output_path=folder / "static")
        export(options, resolve_model(models["dynamic"]))
        models["static"] = folder / "static"
    return {mode: models[mode] for mode in modes}


def measure(name: str, mode: str, model: Path, *, counts: list[int], rounds: int, requests: int) -> None:
    """Prints a line for every number of clients."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serve(model, size)) for size in BATCH_SIZES]
        for count in counts:
            turns = []
            for _ in range(rounds + 1):
                sides = [ask_all(server, count, requests) for server in servers]
                if sides[0].texts != sides[1].texts:
                    raise SystemExit(f"{name}, {mode}, {count} clients: the texts differ")
                turns.append(sides)
            line = f"{name:<7}{mode:<9}{count:<8}"
            for kind in ("per_second", "per_processor_second"):
                together, alone = ([getattr(sides[each], kind) for sides in turns[1:]] for each in (0, 1))
                ratio = statistics.median(fast / slow for fast, slow in zip(together, alone, strict=True))
                line += (
                    f"|{statistics.median(together):>9.0f}{statistics.median(alone):>8.0f}{ratio:>8.2f}   "
                )
            print(line, flush=True)


@dataclass(frozen=True)
class Turn:
    """What the clients of one turn got.

    Attributes:
        per_second: Tokens by the clock.
        per_processor_second: Tokens by the server's processor time.
        texts: Of every client.
    """

    per_second: float
    per_processor_second: float
    texts: list[list[str]]


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    port: int
    process: psutil.Process

    def processor_seconds(self) -> float:
        """Used so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def serve(model: Path, batch_size: int) -> Iterator[Server]:
    """The server while it runs."""
    command = [
        sys.executable, "-m", "finetune", "serve", str(model), "--served_model_name", "model", "--port", "0",
        "--device", "cpu", "--max_batch_size", str(batch_size),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.search(r":(\d+)/v1", process.stdout.readline())
        assert found, "the server did not start"
        yield Server(int(found[1]), psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(60)


def ask_all(server: Server, num_clients: int, num_requests: int) -> Turn:
    """Lets the clients ask at the same time."""
    begin, used = time.perf_counter(), server.processor_seconds()
    with ThreadPoolExecutor(num_clients) as pool:
        answers = list(pool.map(lambda client: ask(server.port, client, num_requests), range(num_clients)))
    seconds, used = time.perf_counter() - begin, server.processor_seconds() - used
    num_tokens = sum(num for num, _ in answers)
    return Turn(num_tokens / seconds, num_tokens / used, [texts for _, texts in answers])


def ask(port: int, client: int, num_requests: int) -> tuple[int, list[str]]:
    """The requests of one client: tokens of the answers, and their texts."""
    numbers = random.Random(client)
    num_tokens, texts = 0, []
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
        for _ in range(num_requests):
            prompt = [numbers.randrange(3, 300) for _ in range(PROMPT_LENGTH)]
            fields = {"model": "model", "prompt": prompt, "max_tokens": NUM_NEW_TOKENS, "temperature": 0}
            connection.request("POST", "/v1/completions", json.dumps(fields))
            answer = json.loads(connection.getresponse().read())
            num_tokens += answer["usage"]["completion_tokens"]
            texts.append(answer["choices"][0]["text"])
    return num_tokens, texts


if __name__ == "__main__":
    main()
