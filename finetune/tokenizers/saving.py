"""A tokenizer beside trained weights: the files it was read from, so that others read the same tokens from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune.storage.code_files import copy_code
from finetune.storage.template_files import copy_named
from finetune.tokenizers.loading import SOURCE_FOLDER

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_COPIED = (
    *_SETTINGS,
    "tokenizer.json",
    "tekken.json",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes PaddleNLP's files, then those of the folder that the tokenizer was read from over them.

    PaddleNLP reads its vocabulary under its own names; what it writes of added tokens and templates is less than
    what was there.

    Args:
        tokenizer: From `finetune.tokenizers.loading.load_tokenizer`.
        folder: Where the weights are.
    """
    tokenizer.save_pretrained(str(folder))
    source = getattr(tokenizer, SOURCE_FOLDER, None)
    if source is None or source.resolve() == folder.resolve() or not (source / _SETTINGS[0]).is_file():
        return
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
        elif name in _SETTINGS:
            (folder / name).unlink(missing_ok=True)
    copy_code(source, folder, _SETTINGS[0])
    copy_named(source, folder)
