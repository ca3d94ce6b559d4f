"""Which entry of the cache belongs to a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.samples.cache import ArrayStore, EncodedData, default_folder, load_or_build, make_key
from finetune.data.samples.sample_store import SampleStore
from finetune.data.templates.template import asks_for_time
from finetune.data.templates.template_clock import template_time
from finetune.storage.template_files import named_files

if TYPE_CHECKING:
    from finetune.data.reading.mixing import DataSource
    from finetune.settings.arguments import Arguments

_WITHOUT_EFFECT = (
    *("data_cache", "data_cache_dir", "preview", "zero_padding", "pad_to_multiple_of"),
    *("save_generation_output", "lazy"),
)
_TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".tiktoken", ".jinja")
_SPLITS = ("train", "dev")


def read_cached(
    args: Arguments,
    sources: dict[str, list[DataSource]],
    tokenizer_folder: Path,
    build: Callable[[], dict[str, Any]],
    kind: type[ArrayStore] = SampleStore,
    comparison: str | None = None,
) -> dict[str, Any]:
    """The data of a run by field: train, dev (samples), prompts and reports.

    Args:
        args: The settings.
        sources: The data sets by split.
        tokenizer_folder: Where the tokenizer's files are.
        build: Makes the data where the cache does not have them.
        kind: Of the samples.
        comparison: What a preference method compares, "pairs" or "marked".
    """
    built: dict[str, Any] = {}

    def build_entry() -> EncodedData:
        built.update(build())
        stores = {split: built[split] for split in _SPLITS if isinstance(built[split], kind)}
        prompts = {"dev": built["prompts"]} if built.get("prompts") else {}
        return EncodedData(stores, prompts, built["reports"])

    folder = Path(args.data.data_cache_dir).expanduser() if args.data.data_cache_dir else default_folder()
    key = find_key(args, sources, tokenizer_folder, comparison)
    entry = load_or_build(folder, key, build_entry, kind)
    samples: dict[str, Any] = {split: entry.stores.get(split, []) for split in _SPLITS}
    return built or {**samples, "prompts": entry.prompts.get("dev", []), "reports": entry.reports}


def find_key(
    args: Arguments,
    sources: dict[str, list[DataSource]],
    tokenizer_folder: Path,
    comparison: str | None = None,
) -> str:
    """The key of the run's data: all that decides what they become."""
    data = {
        name: value for name, value in dataclasses.asdict(args.data).items() if name not in _WITHOUT_EFFECT
    }
    settings = {
        "data": data,
        "comparison": comparison,
        "seed": args.training.seed,
        "train": args.training.do_train,
        "eval": args.training.do_eval,
        "sources": [[split, str(source)] for split, found in sources.items() for source in found],
        "tokenizer": str(tokenizer_folder),
    }
    if asks_for_time(data["chat_template"], tokenizer_folder):
        settings["day"] = template_time().date().isoformat()
    files: Sequence[Path] = [file for found in sources.values() for source in found for file in source.files]
    named = [data["chat_template"], data["self_cognition_file"]]
    own = [path for name in named if name for path in (tokenizer_folder / name, Path(name))]
    own = [file for path in own for file in (_settings_files(path) if path.is_dir() else [path])]
    tokenizer = _settings_files(tokenizer_folder)
    return make_key(settings, [*files, *own, *tokenizer])


def _settings_files(folder: Path) -> list[Path]:
    """The files of a folder that say something of tokenizer or templates."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _TOKENIZER_SUFFIXES and file.is_file())
    return [file for file in files if not file.name.endswith(".index.json")] + named_files(folder)
