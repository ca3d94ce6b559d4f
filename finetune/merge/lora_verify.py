"""Runs a merged model beside its base with the adapters, in float32 on CPU, and shows how far they differ.

An adapter of this project or of PaddleNLP is put on the base by PaddleNLP's own LoRA model; several adapters, and
peft's, by hooks that add x @ A @ B to a layer's output. Both are independent of the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.merge import row_blocks
from finetune.merge.lora_adapters import Adapter
from finetune.merge.lora_plan import Base, open_base
from finetune.models.hf_names import is_turned
from finetune.models.weights import as_float32

_NUM_PROMPTS, _LENGTH = 4, 16


def verify(
    base: Base, adapters: Sequence[Adapter], merged: Path, say: Callable[[str], None] = print
) -> float:
    """Compares logits, prints the largest difference and how much each kind of weight has changed.

    Args:
        base: The base the adapters were merged into.
        adapters: In their order.
        merged: Folder of the result.
        say: Takes the lines.

    Returns:
        The largest absolute difference of a logit.
    """
    from finetune.command import silence_libraries

    silence_libraries()
    prompts = _prompts(base)
    expected = _logits(_adapted_model(base, adapters), prompts)
    found = _logits(_load(merged), prompts)[..., : expected.shape[-1]]
    difference = float(np.abs(found - expected).max())
    say(
        f"verified {_NUM_PROMPTS} prompts of {_LENGTH} tokens in float32: largest difference of a logit {difference:.2e}, "
        f"logits have a spread of {float(expected.std()):.2f}"
    )
    for kind, change in sorted(_changes(base, open_base(merged)).items()):
        say(f"  {kind}: changed by {100 * change:.3g} % of its size")
    return difference


def _prompts(base: Base) -> np.ndarray:
    """Token ids [prompts, length]: any text would do, so none is needed."""
    vocabulary = int(base.adapted_config["vocab_size"])
    return np.random.default_rng(0).integers(0, vocabulary, (_NUM_PROMPTS, _LENGTH))


def _load(folder: Path, num_tokens: int | None = None) -> Any:
    from finetune.models.loading import load_model, resolve_model
    from finetune.models.vocabulary import find_growth

    resolved = resolve_model(folder)
    vocabulary = resolved.family.adapt_config(resolved.config).get("vocab_size")
    growth = find_growth(vocabulary, num_tokens or 0, family=resolved.family, other_tokenizer=True)
    return load_model(resolved, dtype="float32", growth=growth)


def _logits(model: Any, prompts: np.ndarray) -> np.ndarray:
    import paddle

    from finetune.training.loss import logits_of

    model.eval()
    with paddle.no_grad():
        return logits_of(model(input_ids=paddle.to_tensor(prompts))).numpy()


def _adapted_model(base: Base, adapters: Sequence[Adapter]) -> Any:
    model = _load(base.folder, max((adapter.num_tokens or 0 for adapter in adapters), default=0))
    if len(adapters) == 1 and not adapters[0].is_peft:
        from finetune.adapters.lora import load_lora

        return load_lora(model, adapters[0].folder)
    for adapter in adapters:
        if adapter.whole or adapter.needs_unchanged_base:
            raise UserError(
                f"--verify cannot run {adapter.folder}, which replaces tensors, as one of several adapters or in peft's "
                "form: leave --verify out"
            )
        for layer, update in adapter.updates.items():
            _hook(model.get_sublayer(layer), update)
    return model


def _hook(layer: Any, update: row_blocks.Update) -> None:
    import paddle

    left, right = (paddle.to_tensor(np.ascontiguousarray(factor)) for factor in update.factors())
    layer.register_forward_post_hook(lambda layer, inputs, output: output + inputs[0] @ left @ right)


def _changes(base: Base, merged: Base) -> dict[str, float]:
    """Last part of a layer's name -> size of the change over size of the weight (Frobenius norms)."""
    sums: dict[str, np.ndarray] = {}
    for name, entry in merged.entries.items():
        old = base.entries.get(name)
        if old is None or not name.endswith(".weight") or old.shape != entry.shape or len(entry.shape) != 2:
            continue
        turned = (
            is_turned(name, entry.shape, base.family, tied=base.is_tied) and old.is_turned != entry.is_turned
        )
        rows = row_blocks.stored_rows(old.tensor)
        rows = row_blocks.turned_rows(rows) if turned else rows
        kind = name.split(".")[-2]
        sums.setdefault(kind, np.zeros(2))
        for ours, theirs in zip(row_blocks.stored_rows(entry.tensor).blocks(), rows.blocks(), strict=True):
            before = as_float32(theirs)
            change = as_float32(ours) - before
            sums[kind] += [
                np.square(change, dtype=np.float64).sum(),
                np.square(before, dtype=np.float64).sum(),
            ]
    return {
        kind: float(np.sqrt(change / max(size, 1e-30))) for kind, (change, size) in sums.items() if change
    }
