"""Runs a merged model beside its base with the adapters, in float32 on CPU, and judges how far they differ.

An adapter of this project or of PaddleNLP is put on the base by PaddleNLP's own LoRA model; several adapters,
peft's, and those of joined layers on a base that keeps the layers apart by setting the tensors that were trained whole
and by hooks that add x @ A @ B to a layer's output. Both are independent of the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.adapters.peft_folder import WholeTensor
from finetune.machine.memory_limit import check_address_space
from finetune.merge import row_blocks
from finetune.merge.kronecker_update import KroneckerUpdate
from finetune.merge.lora_adapters import Adapter, pissa_update
from finetune.merge.lora_base import Base, open_base
from finetune.merge.lora_plan import dtype_name
from finetune.merge.peft_adapters import split_joined
from finetune.models.hf_names import embedding_name, is_output, is_turned, joined_parts
from finetune.models.reward_head import REWARD_WEIGHT, reward_config
from finetune.storage.dtypes import as_float32

if TYPE_CHECKING:
    from finetune.storage.quantisation.scheme import QuantisationScheme

_NUM_PROMPTS, _LENGTH = 4, 16
# Largest difference of a logit, in units of their spread. Sums in another order leave some 1e-6 in float32. A type of
# 16 bits rounds every changed weight once, by up to 2^-9 (bfloat16) or 2^-12 (float16) of its size, and the errors of all
# layers meet in the logits; a forgotten factor or a turned matrix moves them by the order of their spread.
_BOUNDS = {"float32": 1e-4, "float64": 1e-4, "float16": 0.04, "bfloat16": 0.3}


@dataclass(frozen=True)
class Comparison:
    """Logits of two models on the same prompts.

    Attributes:
        difference: The largest absolute difference of a logit.
        spread: Standard deviation of the expected logits.
        dtype: Element type of the weights, which sets the bound.
    """

    difference: float
    spread: float
    dtype: str

    @property
    def bound(self) -> float:
        """The largest difference that rounding explains."""
        return _BOUNDS[self.dtype] * self.spread

    @property
    def is_close(self) -> bool:
        """Whether rounding explains the difference; never for one that is no number."""
        return self.difference <= self.bound

    def fault(self, result: Path) -> str:
        """What to tell when it does not."""
        return (
            f"--verify: logits differ by up to {self.difference:.2e}, more than the {self.bound:.2e} that rounding to "
            f"{self.dtype} explains ({_BOUNDS[self.dtype]:g} of their spread). {result} stays as it was written: do not "
            "use it before you know why; check that adapter and base belong together"
        )


def verify(
    base: Base,
    adapters: Sequence[Adapter],
    result: Path,
    show_message: Callable[[str], None] = print,
    *,
    unmerge: bool = False,
    scheme: QuantisationScheme | None = None,
    trained: QuantisationScheme | None = None,
) -> Comparison:
    """Compares logits, prints the largest difference and how much each kind of weight has changed.

    Args:
        base: The model that was given: the base the adapters were merged into, or what they were taken out of.
        adapters: In their order.
        result: Folder of the result.
        show_message: Takes the lines.
        unmerge: Whether the adapters were taken out: then it is the result that they are put on.
        scheme: How the base was quantised, and dequantised again, before the merge; None: it was not.
        trained: How it was quantised when the adapters were trained; the other of both is measured, too.
    """
    from finetune.machine.quiet import silence_libraries

    check_address_space()
    silence_libraries()
    prompts = _prompts(base)
    written = open_base(result)
    # One model at a time is in memory.
    expected = _logits(_load(base.folder) if unmerge else _adapted_model(base, adapters, scheme), prompts)
    found = _logits(_adapted_model(written, adapters) if unmerge else _load(result), prompts)
    comparison = Comparison(
        _largest_difference(found, expected),
        float(expected.std()),
        dtype_name([entry.tensor for entry in written.entries.values()]),
    )
    show_message(
        f"verified {_NUM_PROMPTS} prompts of {_LENGTH} tokens in float32: largest difference of a logit "
        f"{comparison.difference:.2e}, allowed for {comparison.dtype} weights {comparison.bound:.2e}, logits have a "
        f"spread of {comparison.spread:.2f}"
    )
    if trained and not unmerge:
        other = _logits(_adapted_model(base, adapters, None if scheme else trained), prompts)
        what = "original base" if scheme else f"base in {trained.label}"
        show_message(f"  against the {what} with the adapter: {_largest_difference(found, other):.2e}")
    for kind, change in sorted(_changes(base, written).items()):
        show_message(f"  {kind}: changed by {100 * change:.3g} % of its size")
    return comparison


def _largest_difference(some: NDArray[Any], others: NDArray[Any]) -> float:
    """Of logits [..., vocabulary], over the tokens that both have."""
    width = min(some.shape[-1], others.shape[-1])
    return float(np.abs(some[..., :width] - others[..., :width]).max())


def _prompts(base: Base) -> NDArray[Any]:
    """Token ids [prompts, length]: any text would do, so none is needed."""
    vocabulary = int(base.adapted_config["vocab_size"])
    return np.random.default_rng(0).integers(0, vocabulary, (_NUM_PROMPTS, _LENGTH))


def _load(
    folder: Path,
    num_tokens: int | None = None,
    scheme: QuantisationScheme | None = None,
    *,
    gives_rewards: bool = False,
) -> Any:
    from finetune.models.loading import load_model
    from finetune.models.resolve import resolve_model
    from finetune.models.vocabulary import find_growth

    resolved = resolve_model(folder)
    if gives_rewards:
        resolved = replace(resolved, config=reward_config(resolved.config, resolved.family))
    vocabulary = resolved.family.adapt_config(resolved.config).get("vocab_size")
    growth = find_growth(vocabulary, num_tokens or 0, family=resolved.family, other_tokenizer=True)
    return load_model(resolved, dtype="float32", growth=growth, quantisation=scheme, keep_packed=False)


def _logits(model: Any, prompts: NDArray[Any]) -> NDArray[Any]:
    import paddle

    from finetune.training.loss import logits_of

    model.eval()
    with paddle.no_grad():
        logits: NDArray[Any] = logits_of(model(input_ids=paddle.to_tensor(prompts))).numpy()
    return logits


def _adapted_model(base: Base, adapters: Sequence[Adapter], scheme: QuantisationScheme | None = None) -> Any:
    num_tokens = max((_num_tokens(adapter, base) for adapter in adapters), default=0)
    gives_rewards = any(REWARD_WEIGHT in adapter.whole for adapter in adapters)
    model = _load(base.folder, num_tokens, scheme, gives_rewards=gives_rewards)
    if len(adapters) == 1 and not adapters[0].is_peft and not _joined_layers_in_parts(base, adapters[0]):
        from finetune.adapters.lora import load_lora

        return load_lora(model, adapters[0].folder)
    hooks: dict[str, list[Any]] = {}
    for adapter in adapters:
        for name, whole in adapter.whole.items():
            _set(model, _own_name(name, base), whole)
            for hook in hooks.pop(_own_name(name, base).removesuffix(".weight"), ()):
                hook.remove()  # what replaces a weight replaces earlier updates of it, too
        for joined, update in adapter.updates.items():
            is_apart = joined in _joined_layers_in_parts(base, adapter)
            parts = (
                split_joined(joined, update, base.adapted_config, base.family)
                if is_apart
                else [(joined, update)]
            )
            for layer, each in parts:
                if adapter.needs_unchanged_base:
                    weight = model.state_dict()[f"{layer}.weight"]
                    each = pissa_update(each, adapter.rule.rank_of(layer), weight.numpy)
                hooks.setdefault(layer, []).append(_hook(model.get_sublayer(layer), each))
    return model


def _joined_layers_in_parts(base: Base, adapter: Adapter) -> set[str]:
    """Joined layers of an adapter whose parts lie apart in the base."""
    return {
        layer for layer in adapter.updates if joined_parts(layer) and f"{layer}.weight" not in base.entries
    }


def _own_name(name: str, base: Base) -> str:
    """The name of the tensor in the model: a tied output layer is the embedding."""
    return embedding_name(base.family) if base.is_tied and is_output(name) else name


def _num_tokens(adapter: Adapter, base: Base) -> int:
    """Rows that the embedding must have for the adapter, 0 when any do."""
    table = embedding_name(base.family)
    rows = [whole.tensor.shape[0] for name, whole in adapter.whole.items() if _own_name(name, base) == table]
    return max([adapter.num_tokens or 0, *rows])


def _set(model: Any, name: str, whole: WholeTensor) -> None:
    array = as_float32(whole.tensor.load())
    model.state_dict()[name].set_value(np.ascontiguousarray(array.T if whole.is_turned else array))


def _hook(layer: Any, update: row_blocks.AnyUpdate) -> Any:
    import paddle

    if isinstance(update, KroneckerUpdate):
        dense = paddle.to_tensor(update.whole())  # [in, out]
        return layer.register_forward_post_hook(lambda _, inputs, output: output + inputs[0] @ dense)
    left, right = (paddle.to_tensor(np.ascontiguousarray(factor)) for factor in update.factors())
    if update.lengths is not None:
        return layer.register_forward_post_hook(_scaling_hook(layer, left, right, update.lengths()))

    def add(layer: Any, inputs: Any, output: Any) -> Any:
        given = inputs[0]
        if not given.is_floating_point():  # an embedding's token ids
            return output + paddle.nn.functional.embedding(given, left) @ right
        return output + given @ left @ right

    return layer.register_forward_post_hook(add)


def _scaling_hook(layer: Any, left: Any, right: Any, lengths: NDArray[Any]) -> Any:
    """The update of a layer whose columns have trained lengths (DoRA)."""
    import paddle

    scale = paddle.to_tensor(lengths) / (layer.weight + left @ right).square().sum(0).sqrt()  # [out]

    def add(layer: Any, inputs: Any, output: Any) -> Any:
        bias = 0.0 if layer.bias is None else layer.bias
        return (output - bias + inputs[0] @ left @ right) * scale + bias

    return add


def _changes(base: Base, merged: Base) -> dict[str, float]:
    """Last part of a layer's name -> size of the change over size of the weight (Frobenius norms)."""
    sums: dict[str, NDArray[Any]] = {}
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
