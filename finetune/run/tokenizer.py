"""The tokenizer of a run, and the embeddings that it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.processes.layout import Layout
from finetune.run.adapter_source import adapter_folder
from finetune.run.layout import check_topology

if TYPE_CHECKING:
    from finetune.models.resolve import ResolvedModel
    from finetune.models.vocabulary import VocabularyGrowth
    from finetune.settings.arguments import Arguments
    from finetune.tokenizers.encoder import FamilyEncoder


@dataclass
class TokenizerPair:
    """A tokenizer as PaddleNLP has it and as the project uses it.

    Attributes:
        tokenizer: PaddleNLP's.
        encoder: Ours around it.
        note: Why many texts take longer than they need to; "" when they do not.
    """

    tokenizer: Any
    encoder: FamilyEncoder
    note: str = ""


def load_tokenizer_pair(args: Arguments, resolved: ResolvedModel) -> TokenizerPair:
    """Loads the tokenizer, the model's own unless another one is named.

    Raises:
        UserError: It cannot be read, or the adapter to be loaded was trained with another one.
    """
    from finetune.adapters.files import check_tokenizer
    from finetune.tokenizers.encoder import load_encoder

    source = args.model.tokenizer_name_or_path or resolved.folder or resolved.name
    encoder = load_encoder(
        source,
        resolved.family,
        models=[resolved.folder],
        splits_special=args.data.split_special_tokens,
    )
    tokenizer = encoder.tokenizer
    if adapter := adapter_folder(args):
        # Here rather than where the adapter is loaded: before any data is tokenized.
        check_tokenizer(adapter, len(tokenizer))
    reason = encoder.slow_because
    note = f"Tokenizing with PaddleNLP, text by text: {reason}." if reason else ""
    return TokenizerPair(tokenizer, encoder, note)


def tokenizer_folder(args: Arguments) -> Path:
    """Where the tokenizer's files lie, or would lie: a name on the hub may be in the cache."""
    from finetune.models import hub
    from finetune.models.hubs.repository import cached_model

    name = str(args.model.tokenizer_name_or_path or args.model.model_name_or_path)
    return (
        Path(name)
        if Path(name).is_dir()
        else hub.cached_folder(name) or cached_model(name, needs_weights=False) or Path(name)
    )


def plan_vocabulary(args: Arguments, resolved: ResolvedModel, pair: TokenizerPair) -> VocabularyGrowth | None:
    """Embeddings that the model needs for a tokenizer with more tokens; None when it has enough.

    Raises:
        UserError: The model's own tokenizer has more tokens than the model has embeddings.
    """
    from finetune.adapters.files import count_embeddings
    from finetune.models.vocabulary import find_growth, is_other_tokenizer

    family, num_tokens = resolved.family, pair.encoder.num_tokens
    vocab_size = family.adapt_config(resolved.config).get("vocab_size")
    if adapter := adapter_folder(args):
        num_tokens = count_embeddings(adapter, family, num_tokens=num_tokens, vocab_size=vocab_size)
    return find_growth(
        vocab_size,
        num_tokens,
        family=family,
        other_tokenizer=is_other_tokenizer(
            args.model.tokenizer_name_or_path, resolved.folder or resolved.name
        ),
    )


def vocabulary_notes(
    args: Arguments, resolved: ResolvedModel, pair: TokenizerPair, layout: Layout
) -> list[str]:
    """What the person should know of the model's origin, the tokenizer and added embeddings; empty when that is nothing.

    Raises:
        UserError: See `plan_vocabulary`; or the larger vocabulary cannot be divided over the layout.
    """
    from finetune.models.vocabulary import describe

    growth, model = plan_vocabulary(args, resolved, pair), args.model
    if growth:
        check_topology(layout, resolved, args, vocab_size=growth.new)
    untrained = model.prefix_tuning or (model.lora and not (model.modules_to_save or model.lora_path))
    notes = [f"Model: {resolved.remote}"] if resolved.remote else []
    notes += [pair.note] if pair.note else []
    return notes + (describe(growth, untrained=untrained and args.training.do_train) if growth else [])
