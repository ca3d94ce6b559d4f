"""A valid argument file, and what is parsed from it with other settings."""

import json
from pathlib import Path

from finetune.settings.arguments import parse_arguments

VALID = {
    "model_name_or_path": "owner/model",
    "dataset_name_or_path": "data",
    "output_dir": "out",
    "do_train": True,
}


def parse(settings=None, *words: str):
    Path("args.json").write_text(json.dumps({**VALID, **(settings or {})}), encoding="utf-8")
    return parse_arguments(["args.json", *words])
