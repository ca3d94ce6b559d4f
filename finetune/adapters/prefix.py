"""Prefix tuning: trained keys and values in front of every layer's own.

Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (2021). The
prefix is one embedding [num_prefix_tokens, layers * 2 * key/value heads * head size]; the
family record knows how its parts become the model's past keys and values.

Every process of a tensor-parallel or pipeline-parallel run holds the whole embedding and uses the part that
its heads and layers need.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddlenlp.peft import PrefixConfig, PrefixModelForCausalLM

from finetune.adapters.files import load_adapter_weights
from finetune.errors import UserError
from finetune.families.family import import_object
from finetune.machine.randomness.seeding import derive_seed
from finetune.models.layers import layer_list
from finetune.models.local_layers import layer_numbers
from finetune.storage.files import is_present, read_json_object

CONFIG_FILE = "prefix_config.json"


class PrefixModel(PrefixModelForCausalLM):
    """PaddleNLP's, whose prefix means the same however the model is divided.

    PaddleNLP divides the embedding among tensor ranks by tokens and then cuts its columns as if heads came
    before layers, so that a prefix trained under one degree is another one under the next; and it cannot
    divide the heads of ChatGLM2.
    """

    def __init__(self, model: Any, config: PrefixConfig, postprocess: Any, *, seed: int = 0):
        config.tensor_parallel_degree = model.config.tensor_parallel_degree  # PaddleNLP warns otherwise
        super().__init__(model, config, postprocess)
        # In a tuple: as an attribute the list would be a second sublayer of ours, and its weights be saved twice.
        self._decoder = (layer_list(model),)
        config.tensor_parallel_degree = -1  # every rank holds, and writes, the whole embedding
        weight = self.prefix_encoder[0].weight
        bound = math.sqrt(6 / sum(weight.shape))  # Glorot and Bengio's, as Paddle's embeddings start
        random = np.random.default_rng(derive_seed(seed, "prefix"))
        values = random.uniform(-bound, bound, weight.shape).astype(
            np.float32
        )  # [prefix, layers * 2 * kv heads * head dim]
        weight.set_value(paddle.to_tensor(values).astype(weight.dtype))

    def _create_prefix_encoder(self) -> Any:
        """The embedding under the names of PaddleNLP's encoder, whole under any tensor-parallel degree."""
        config = self.prefix_config
        degree, config.tensor_parallel_degree = config.tensor_parallel_degree, -1
        encoder = super()._create_prefix_encoder()
        config.tensor_parallel_degree = degree
        return encoder

    def _get_past_key_values(self, batch_size: int) -> Any:
        config = self.prefix_config
        tokens = self.prefix_tokens.unsqueeze(0).expand([batch_size, -1])  # [batch, prefix]
        sizes = [2, -1, self.num_heads, self.head_dim]  # -1 for the layers
        past = self.prefix_encoder(tokens).reshape(
            [batch_size, config.num_prefix_tokens, *sizes]
        )  # [batch, prefix, 2, layers, kv heads, head dim]
        numbers = layer_numbers(*self._decoder)
        if len(numbers) < past.shape[3]:
            past = paddle.stack([past[:, :, :, number] for number in numbers], axis=3)
        heads = _own_heads(self.model.config, self.num_heads)
        past = past[..., heads.start : heads.stop, :].flatten(
            2, 3
        )  # [batch, prefix, 2 * layers, own kv heads, head dim]
        return self.postprocess_past_key_value(past)


def _own_heads(config: Any, num_heads: int) -> range:
    """Key and value heads of this tensor rank.

    Where there are fewer than ranks, every rank keeps all and its attention picks what it needs.
    """
    degree = max(config.tensor_parallel_degree, 1)
    if num_heads % degree:
        return range(num_heads)
    size = num_heads // degree
    first = size * max(config.tensor_parallel_rank, 0) if degree > 1 else 0
    return range(first, first + size)


def partial_gradients(model: Any) -> set[str]:
    """Parameters that every process holds whole but gets only a share of the gradient of.

    Shares add up over the tensor group and over the pipeline group.

    Returns:
        Names as in `model.named_parameters()`; none unless the model has a prefix.
    """
    if not hasattr(model, "prefix_config"):
        return set()
    return {f"prefix_encoder.{name}" for name, _ in model.prefix_encoder.named_parameters()}


def add_prefix(model: Any, settings: Any, *, family: Any, dtype: str, seed: int = 0) -> PrefixModel:
    """Wraps a model so that only a prefix trains.

    Args:
        model: A PaddleNLP causal language model.
        settings: The model arguments (`num_prefix_tokens`).
        family: The record of the model's family, for the prefix geometry.
        dtype: Dtype of the prefix.
        seed: The seed of the run, for the initial prefix.

    Returns:
        The model behind its prefix.
    """
    geometry = family.prefix_geometry(model.config)
    config = PrefixConfig(
        num_prefix_tokens=settings.num_prefix_tokens,
        num_attention_heads=geometry.num_heads,
        multi_query_group_num=geometry.num_kv_heads,
        num_hidden_layers=geometry.num_layers,
        hidden_size=geometry.head_dim * geometry.num_heads,
        prefix_projection=False,
        dtype=dtype,
    )
    return _with_prefix(model, config, family=family, seed=seed)


def load_prefix(model: Any, folder: Path, *, family: Any) -> PrefixModel:
    """Puts a saved prefix on a model, trainable again, in the dtype of the model.

    Raises:
        UserError: The folder holds no prefix or one of another shape.
    """
    if not is_present(folder / CONFIG_FILE):
        raise UserError(
            f"prefix_path {folder} holds no {CONFIG_FILE}: point it at the output folder "
            "(or a checkpoint) of a prefix-tuning run."
        )
    config = PrefixConfig()
    for key, value in read_json_object(folder / CONFIG_FILE).items():
        setattr(config, key, value)
    config.dtype = model.config.dtype  # whatever it was trained in
    adapted = _with_prefix(model, config, family=family)
    load_adapter_weights(adapted, folder)
    return adapted


def _with_prefix(model: Any, config: PrefixConfig, *, family: Any, seed: int = 0) -> PrefixModel:
    if family.prefix_needs_cache:
        model.config.use_cache = True  # otherwise the model would drop the prefix without a word
    postprocess = import_object(family.prefix_geometry(model.config).postprocess)
    return PrefixModel(model, config, postprocess, seed=seed)
