"""Prefix tuning: trained keys and values in front of every layer's own.

Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (2021). The
prefix is one embedding [num_prefix_tokens, layers * 2 * key/value heads * head size]; the
family record knows how its parts become the model's past keys and values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.models.family import import_object

CONFIG_FILE = "prefix_config.json"


def add_prefix(model: Any, settings: Any, *, family: Any, dtype: str) -> Any:
    """Wraps a model so that only a prefix trains.

    Args:
        model: A PaddleNLP causal language model.
        settings: The model arguments (`num_prefix_tokens`).
        family: The record of the model's family, for the prefix geometry.
        dtype: Dtype of the prefix.

    Returns:
        PaddleNLP's PrefixModelForCausalLM.
    """
    from paddlenlp.peft import PrefixConfig

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
    return _with_prefix(model, config, family=family)


def load_prefix(model: Any, folder: Path, *, family: Any) -> Any:
    """Puts a saved prefix on a model, trainable again.

    Raises:
        UserError: The folder holds no prefix or one of another shape.
    """
    from paddlenlp.peft import PrefixConfig

    from finetune.adapters.checkpoint import load_adapter_weights

    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"prefix_path {folder} holds no {CONFIG_FILE}: point it at the output folder "
            "(or a checkpoint) of a prefix-tuning run."
        )
    config = PrefixConfig()
    for key, value in json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).items():
        setattr(config, key, value)
    adapted = _with_prefix(model, config, family=family)
    load_adapter_weights(adapted, folder)
    return adapted


def _with_prefix(model: Any, config: Any, *, family: Any) -> Any:
    from paddlenlp.peft import PrefixModelForCausalLM

    if family.prefix_needs_cache:
        model.config.use_cache = True  # otherwise the model would drop the prefix without a word
    postprocess = import_object(family.prefix_geometry(model.config).postprocess)
    return PrefixModelForCausalLM(model, config, postprocess)
