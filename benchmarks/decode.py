"""Greedy decoding: the exported static graph against PaddleNLP's dynamic `generate`.

    python benchmarks/decode.py [--rounds 5] [--models tiny,100m] [--families llama] [--batches 1,8]

Whole generate calls of 100 new tokens behind prompts of 32, float32 on CPU, both sides alternately in one
process with the settings of finetune.machine.processor. Compare the ratios, which are medians over the rounds of the
ratio within a round; tokens/s are medians too. The static side includes its Python code around the graph.
Both sides must give the same tokens, or the script stops.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.machine.processor import configure_processor  # noqa: E402
from finetune.models.tiny.checkpoint import build_tiny  # noqa: E402
from finetune.serving.decoding.settings import DecodingSettings  # noqa: E402

NUM_NEW_TOKENS = 100
PROMPT_LENGTH = 32
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "100m": {
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "vocab_size": 8000,
        "intermediate_size": 2048,
        "max_length": 1024,
    },
}


def main() -> None:
    """Builds, exports and measures every combination."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of every side, after one that does not count"
    )
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--families", default="llama", help="names of families, with commas")
    parser.add_argument("--batches", default="1,8", help="batch sizes")
    args = parser.parse_args()
    print(configure_processor())
    from finetune.machine.quiet import silence_libraries

    silence_libraries()
    print(f"{'model':<16}{'params':>9}  batch  dynamic tokens/s  static tokens/s  ratio (lowest to highest)")
    for name in args.models.split(","):
        for family in args.families.split(","):
            with tempfile.TemporaryDirectory() as folder:
                measure(family, name, Path(folder), batches=args.batches.split(","), num_rounds=args.rounds)


def measure(family: str, name: str, folder: Path, *, batches: list[str], num_rounds: int) -> None:
    """Prints a line for every batch size of one model."""
    from finetune.families.family import get_family
    from finetune.models.loading import load_model
    from finetune.models.resolve import resolve_model
    from finetune.serving.decoding.decoder import StaticDecoder
    from finetune.serving.export.options import ExportOptions
    from finetune.serving.export.run import export

    sizes = dict(MODELS[name])
    if get_family(family).tiny.inner_ratio:
        sizes.pop("intermediate_size", None)
    resolved = resolve_model(build_tiny(family, folder / "model", **sizes))
    options = ExportOptions(model_name_or_path=str(resolved.folder), output_path=folder / "exported")
    export(options, resolved)
    decoder = StaticDecoder(options.output_path)
    model = load_model(resolved, dtype="float32")
    num_parameters = sum(int(each.size) for each in model.parameters())
    settings = DecodingSettings(max_new_tokens=NUM_NEW_TOKENS, stop_ids=())
    for batch in map(int, batches):
        prompts = np.random.default_rng(0).integers(5, 400, (batch, PROMPT_LENGTH))
        rounds = [
            (dynamic_turn(model, prompts, settings), static_turn(decoder, prompts, settings))
            for _ in range(num_rounds + 1)
        ][1:]
        if any(dynamic[1] != static[1] for dynamic, static in rounds):
            raise SystemExit(f"{family} {name}, batch {batch}: the two sides give different tokens")
        seconds = [(dynamic[0], static[0]) for dynamic, static in rounds]
        ratios = [dynamic / static for dynamic, static in seconds]
        speeds = [batch * NUM_NEW_TOKENS / statistics.median(side) for side in zip(*seconds, strict=True)]
        print(
            f"{family + ' ' + name:<16}{num_parameters / 1e6:>8.1f}M{batch:>7}{speeds[0]:>18.0f}{speeds[1]:>17.0f}"
            f"{statistics.median(ratios):>7.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def dynamic_turn(
    model: Any, prompts: np.ndarray, settings: DecodingSettings
) -> tuple[float, list[list[int]]]:
    """Seconds and tokens of one `generate`."""
    import paddle

    start = time.perf_counter()
    ids = paddle.to_tensor(prompts)
    with paddle.no_grad():
        made, _ = model.generate(
            input_ids=ids,
            attention_mask=paddle.ones_like(ids),
            position_ids=paddle.arange(ids.shape[1]).expand(ids.shape),
            eos_token_id=[-1],
            pad_token_id=0,
            **settings.to_kwargs(),
        )
    tokens = made.tolist()
    return time.perf_counter() - start, tokens


def static_turn(
    decoder: Any, prompts: np.ndarray, settings: DecodingSettings
) -> tuple[float, list[list[int]]]:
    """The same with the exported graph."""
    start = time.perf_counter()
    tokens = decoder.generate(prompts.tolist(), settings)
    return time.perf_counter() - start, tokens


if __name__ == "__main__":
    main()
