"""The texts that a quantised model is fitted to and measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.reading.source import find_evaluation_files, find_split
from finetune.data.samples.dataset import load_samples
from finetune.data.templates.template import load_template
from finetune.errors import UserError
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.export.options import ExportOptions

if TYPE_CHECKING:
    from finetune.tokenizers.encoder import FamilyEncoder

_MEASURED_SHARE = 5
"""One of so many texts for calibration is measured on instead, where no others are given."""


def read_texts(
    options: ExportOptions, encoder: FamilyEncoder, tokenizer_folder: Path
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Samples to fit to, and samples to measure on, which are others.

    Raises:
        UserError: Faulty lines, or too few texts to keep some for measuring.
    """
    fitted = _samples(options.calibration_data, options, encoder, tokenizer_folder)
    if options.perplexity_data:
        return fitted, _samples(options.perplexity_data, options, encoder, tokenizer_folder)
    count = len(fitted) // _MEASURED_SHARE
    if fitted and not count:
        raise UserError(
            f"calibration_data {options.calibration_data} holds {len(fitted)} texts, of which the last fifth is to be "
            f"measured on: give {_MEASURED_SHARE} or more, or others as --perplexity_data"
        )
    return fitted[: len(fitted) - count], fitted[len(fitted) - count :]


def _samples(
    path: Path | None, options: ExportOptions, encoder: FamilyEncoder, tokenizer_folder: Path
) -> list[Any]:
    if path is None:
        return []
    model = ModelOptions(
        model_name_or_path=options.model_name_or_path,
        lora_path=options.lora_path,
        chat_template=options.chat_template,
    )
    template = load_template(
        model.template_name(tokenizer_folder), tokenizer_folder, enable_thinking=model.thinking()
    )
    files = find_split(path, "train") if path == options.calibration_data else find_evaluation_files(path)
    store, _ = load_samples(
        files,
        encoder,
        template,
        src_length=options.max_length * 3 // 4,
        max_length=options.max_length,
        split_texts=True,
        system=model.system_text(),
    )
    return list(store)
