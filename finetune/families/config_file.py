"""config.json of a model folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.multimodal.text_part import text_part
from finetune.storage.files import is_present, read_json_object
from finetune.storage.quantisation.side_files import with_side_facts

_MAX_SIZE = 2**40
_NEVER_NULL = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings",
    "tie_word_embeddings",
)  # fmt: skip
_Check = Callable[[Any], bool]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, with what a file beside it says of packed weights.

    Of a multimodal model it is the configuration of the text part. A `quantization_config` of null, which says nothing,
    is left out.

    Raises:
        UserError: It is missing, is no JSON object, or a field holds another kind of value than fields of its name do.
    """
    path = folder / "config.json"
    if not is_present(path):
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    config = read_json_object(path)
    if "quantization_config" in config and config["quantization_config"] is None:
        del config["quantization_config"]
    try:
        text = text_part(config)
    except UserError as error:
        raise UserError([f"{path}: {fault}" for fault in error.faults]) from None
    if faults := list(find_wrong_fields(text)):
        raise UserError([f"{path}: {fault}: copy it again" for fault in faults])
    return with_side_facts(text, folder)


def find_wrong_fields(config: Mapping[str, Any]) -> Iterator[str]:
    """Fields whose value no model can have; whether it is the right one, the weights tell.

    Args:
        config: Of a model. What a field holds is told by its name, as all families name theirs alike.
    """
    for name, value in config.items():
        if value is None and name not in _NEVER_NULL:
            continue
        if name == "sliding_window" and "use_sliding_window" in config:
            continue  # Qwen's files keep the number of a window that is switched off
        for pattern, (is_right, what) in _KINDS.items():
            if re.search(pattern, name):
                if not is_right(value):
                    yield f"{name} is {_show(value)}, but must be {what}"
                break


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) < _MAX_SIZE and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_SIZE


def _is_positive_size(value: Any) -> bool:
    return _is_size(value) and value > 0


def _is_id(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(each, int) and not isinstance(each, bool) and abs(each) < 2**31 for each in values)


def _counts_layers(value: Any) -> bool:
    return all(map(_is_size, value)) if isinstance(value, list) else _is_size(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_KINDS: dict[str, tuple[_Check, str]] = {
    r"^(architectures|layer_types)$": (_are_texts, "a list of names"),
    r"^(model_type|torch_dtype|dtype|hidden_act|hidden_activation|activation_function|_name_or_path)$": (
        lambda value: isinstance(value, str),
        "a text",
    ),
    r"^(vocab_size|hidden_size|n_embe?d|intermediate_size|moe_intermediate_size|ffn_dim|ffn_hidden_size|max_position_embeddings|"
    r"n_positions|sliding_window|num_(hidden_)?layers|n_layer|num_(attention|key_value|kv)_heads|n_head|head_dim)$": (
        _is_positive_size,
        "a whole number of 1 or more",
    ),
    r"_layers$": (_counts_layers, "a number of layers or their numbers"),
    r"^(tie_|use_|add_|apply_|no_|(quantization|learned|scale)_embeddings$)|^(multi_query_attention|norm_topk_prob|output_router_logits)$": (
        # Qwen's files leave their kernels to the program.
        lambda value: isinstance(value, bool | int) or value == "auto",
        'true, false or "auto"',
    ),
    r"^(rope_scaling|rope_parameters|rotary|quantization_config)$": (
        lambda value: isinstance(value, dict),
        "an object",
    ),
    r"_token_ids?$": (_is_id, "the number of a token"),
    r"(_size|_dim|(?<!pruned)_heads|_length|_channels|_num|_embeddings|_positions|_experts|_experts_per_tok|_sparse_step)$|^n_": (
        _is_size,
        "a whole number of 0 or more",
    ),
    r"(_theta|_base|_base_freq)$": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    r"(_eps|_epsilon|_std|_range|_ratio|_scale|dropout|_prob|_coef)$": (_is_number, "a number"),
}
"""Pattern of names -> what their values are."""


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
