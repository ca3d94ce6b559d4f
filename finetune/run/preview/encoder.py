"""The tokenizer of a preview: ours, which loads at once, or PaddleNLP's where ours is not known to agree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.models.resolve import ResolvedModel
    from finetune.settings.arguments import Arguments


class PaddleEncoder:
    """PaddleNLP's tokenizer with the names of its pieces.

    Args:
        encoder: A `finetune.tokenizers.encoder.FamilyEncoder`.
    """

    def __init__(self, encoder: Any):
        self._encoder = encoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def pieces(self, ids: Sequence[int]) -> list[str | bytes]:
        """The pieces as the vocabulary has them."""
        return list(self._encoder.tokenizer.convert_ids_to_tokens([int(index) for index in ids]))


def load_preview_encoder(args: Arguments, resolved: ResolvedModel) -> tuple[Any, str]:
    """Finds the tokenizer of a run.

    Returns:
        The encoder, and a line that says why PaddleNLP was needed ("" when it was not).

    Raises:
        UserError: The tokenizer's files are missing or cannot be read.
    """
    from finetune.machine.quiet import silence_libraries
    from finetune.run.tokenizer import load_tokenizer_pair

    encoder, reason = _load_fast(args, resolved)
    if encoder is not None:
        return encoder, ""
    silence_libraries()
    pair = load_tokenizer_pair(args, resolved)
    return PaddleEncoder(pair.encoder), f"Reading the tokenizer with PaddleNLP: {reason}."


def _load_fast(args: Arguments, resolved: ResolvedModel) -> tuple[Any, str]:
    source = args.model.tokenizer_name_or_path or resolved.folder
    if source is None or not Path(source).is_dir():
        return None, f"{source or resolved.name} is no folder"
    from finetune.storage.lfs_pointers import refuse_pointers
    from finetune.tokenizers.fast_encoder import load_fast_encoder

    refuse_pointers(Path(source))
    return load_fast_encoder(Path(source), resolved.family, splits_special=args.data.split_special_tokens)
