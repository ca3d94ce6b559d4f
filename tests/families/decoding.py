"""Runs tiny models in the ways that training and generation run them, to compare the two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from finetune.adapters.lora import add_lora
from finetune.adapters.prefix import add_prefix
from finetune.data.samples.tokenize import IGNORE_INDEX, Prompt
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.training.loss import logits_of
from tests.families.cases import FACTS

NUM_PREFIX_TOKENS = 3
CONTEXT_END = (5, 8)
"""[gMASK] and <sop> of a tiny ChatGLM-6B."""
WEIGHT_SCALE = 8.0
"""Tiny weights are multiplied by this: with a spread of 0.02 attention is uniform and hides faults."""


def load_sharp(folder, **overrides: Any) -> Any:
    """The tiny model, its matrices and biases scaled up."""
    model = load_model(
        resolve_model(folder), dtype="float32", config_overrides={"use_cache": False, **overrides}
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln_" not in name:
            parameter.set_value(parameter * WEIGHT_SCALE)
    return model


def with_prefix(model: Any, family: Any, *, seed: int = 1) -> Any:
    """A random prefix that matters."""
    import paddle

    settings = SimpleNamespace(num_prefix_tokens=NUM_PREFIX_TOKENS)
    adapted = add_prefix(model, settings, family=family, dtype="float32")
    paddle.seed(seed)
    for parameter in adapted.prefix_encoder.parameters():
        parameter.set_value(paddle.randn(parameter.shape))
    adapted.eval()
    return adapted


def with_lora(model: Any, family: Any) -> Any:
    """LoRA on the family's default layers."""
    settings = SimpleNamespace(
        lora_target_modules=None, lora_rank=2, lora_alpha=4, lora_dropout=0.0, rslora=False,
        lora_plus_scale=1.0, pissa=False, model_name_or_path="tiny", modules_to_save=None,
        use_dora=False, lora_use_mixer=False, rank_pattern=None, alpha_pattern=None, lora_bias="none", lora_dtype=None,
        init_lora_weights="default", vera=False, lokr=False,
    )  # fmt: skip
    return add_lora(model, settings, family=family, dtype="float32")


def with_moved_lora(model: Any, family: Any, *, seed: int = 1) -> Any:
    """LoRA whose second matrices, which begin at zero, matter; only its matrices are trained."""
    import paddle

    adapted = with_lora(model, family)
    paddle.seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.set_value(paddle.randn(parameter.shape) * 0.3)
    adapted.mark_only_lora_as_trainable()
    adapted.eval()
    return adapted


def random_rows(lengths, vocab_size: int = 300, seed: int = 0) -> list[np.ndarray]:
    """Rows of ordinary token ids."""
    random = np.random.default_rng(seed)
    return [random.integers(3, vocab_size, size=length) for length in lengths]


def family_rows(family: Any, lengths, **draws: Any) -> list[np.ndarray]:
    """`random_rows`; texts of a family that reads contexts in both directions have one where they are long enough."""
    rows = random_rows(lengths, **draws)
    if FACTS[family.name].sees_ahead:
        for row in rows:
            if len(row) > 3:
                row[len(row) // 4 : len(row) // 4 + 2] = CONTEXT_END
    return rows


def logits(model: Any, ids: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
    """[batch, length, vocabulary] of one forward pass, as the trainer makes it."""
    import paddle

    model.eval()
    with paddle.no_grad():
        tensors = {name: paddle.to_tensor(array) for name, array in inputs.items()}
        return logits_of(model(input_ids=paddle.to_tensor(ids), **tensors)).numpy()


def stepwise_logits(model: Any, ids: np.ndarray, prompt_length: int) -> np.ndarray:
    """Logits from the end of the prompt on, one token at a time with the cache, as `generate` makes them.

    Args:
        model: The model or a prefix on it.
        ids: [batch, length]; the tokens behind the prompt are forced.
        prompt_length: Tokens of the first forward pass.
    """
    import paddle

    has_prefix = hasattr(model, "prefix_config")
    base = model.model if has_prefix else model
    prepare = model._prepare_inputs_for_generation if has_prefix else base.prepare_inputs_for_generation
    batch = ids.shape[0]
    kwargs: dict[str, Any] = {
        "attention_mask": paddle.ones([batch, prompt_length], dtype="int64"),
        "position_ids": paddle.arange(prompt_length).unsqueeze(0).tile([batch, 1]),
        "use_cache": True,
    }
    steps = []
    with paddle.no_grad():
        for end in range(prompt_length, ids.shape[1] + 1):
            outputs = base(**prepare(paddle.to_tensor(ids[:, :end]), **kwargs))
            steps.append(logits_of(outputs)[:, -1].numpy())
            kwargs = base.update_model_kwargs_for_generation(outputs, kwargs)
    return np.stack(steps, axis=1)


def greedy_without_cache(model: Any, row: np.ndarray, num_tokens: int) -> list[int]:
    """Tokens found by full forward passes over one unpadded row."""
    ids = list(row)
    for _ in range(num_tokens):
        ids.append(int(logits(model, np.array([ids]))[0, -1].argmax()))
    return ids[len(row) :]


def as_prompts(rows: list[np.ndarray]) -> list[Prompt]:
    """Rows as the dev set of a generation."""
    return [Prompt(input_ids=row.astype(np.int32), source="", target="x") for row in rows]


def right_padded(rows: list[np.ndarray], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, [batch, longest]."""
    length = max(map(len, rows))
    ids = np.stack([np.pad(row, (0, length - len(row)), constant_values=pad) for row in rows])
    mask = np.stack([np.arange(length) < len(row) for row in rows]).astype(np.int64)
    return ids, mask


def packed(rows: list[np.ndarray]) -> dict[str, np.ndarray]:
    """One row of several samples: ids, positions that start anew, and a block mask [1, 1, length, length]."""
    segments = np.concatenate([np.full(len(row), place) for place, row in enumerate(rows)])
    same = segments[:, None] == segments[None, :]
    return {
        "ids": np.concatenate(rows)[None],
        "position_ids": np.concatenate([np.arange(len(row)) for row in rows])[None],
        "attention_mask": np.tril(same)[None, None],
    }


def some_labels(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Labels on every token of a row but its first two."""
    labels = np.where(mask == 1, ids, IGNORE_INDEX)
    labels[:, :2] = IGNORE_INDEX
    return labels


def window_of(family: Any, num_tokens: int | None) -> dict[str, Any]:
    """Fields of config.json that give every layer of a family a window, as its published models spell it."""
    return {family.window_option: num_tokens, "use_sliding_window": True, "max_window_layers": 0}
