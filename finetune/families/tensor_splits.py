"""How tensor parallelism divides the weights of a model: which tensors, along which axis, in which blocks.

The facts stand in the family records (`Family.tensor_splits`: pattern of a layer's name -> kind). From them
come the split of a layer's weight and bias, of the LoRA matrices beside it, and of everything that has a weight's
shape (optimizer moments). Loading, saving and the merge scripts all use these rules. NumPy only.

    kind               axis     what a rank holds
    COLUMNS            last     one stretch of the outputs
    KEY_VALUE_COLUMNS  last     the same, as long as every rank gets a whole number of key/value heads
    ROWS               first    one stretch of the inputs
    VOCABULARY         first    one stretch of the tokens, when the degree divides the vocabulary
    HEAD               last     the same; first for a head that is the embedding
    HALVES             last     one stretch of either half: [gate | up]
    QUERY_KEY_VALUE    last     one stretch of each of [queries | keys | values]

Layers that keep query, key and value of each head (or group) together are plain COLUMNS.

A low-rank update W + A @ B of a layer that is split by columns has B split exactly as W is; by rows, A. What has
one number per column (DoRA's lengths, VeRA's b) is divided as a bias is. PaddleNLP's own LoRA cuts B into plain stretches
even where W has blocks, so that its whole B fits W at one degree only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from finetune.families.family import Family
from finetune.storage.splits import Split

COLUMNS = "columns"
KEY_VALUE_COLUMNS = "key_value_columns"
ROWS = "rows"
VOCABULARY = "vocabulary"
HEAD = "head"
HALVES = "halves"
QUERY_KEY_VALUE = "query_key_value"

_NAME = re.compile(
    r"(?P<layer>.+)\.(?P<tensor>weight|decoder_weight|bias|lora_A|lora_B|lora_magnitude|vera_lambda_b)"
)
_LAST = -1


def find_split(family: Family, name: str, config: Any, *, degree: int | None = None) -> Split | None:
    """How a tensor is divided; None when every rank of a tensor-parallel group holds the same.

    Args:
        family: Record of the model.
        name: PaddleNLP's parameter name, with any first parts; a weight, a bias or a LoRA matrix. Optimizer state
            of a parameter's shape, `<parameter>/<accumulator>`, is divided as the parameter is.
        config: The model's configuration as the family adapts it, a dict or PaddleNLP's object.
        degree: When given, a tensor that is held whole at this degree gives None, too.
    """
    match = None if is_scalar(name) else _NAME.fullmatch(tensor_of(name))
    kind = _kind(family, match["layer"]) if match else None
    if match is None or kind is None:
        return None
    split = _SPLITS[kind](family, config)
    by_rows = split.axis == 0
    if match["tensor"] in (("bias", "lora_B", "lora_magnitude", "vera_lambda_b") if by_rows else ("lora_A",)):
        return None
    return None if degree is not None and not split.applies(degree) else split


def tensor_of(name: str) -> str:
    """The parameter whose shape a stored tensor has: itself, or that of `<parameter>/<accumulator>`."""
    return name.rpartition("/")[0] or name


def is_scalar(name: str) -> bool:
    """Whether the name is of optimizer state that is one number per parameter, and so never divided."""
    return "/" in name and name.rpartition("/")[2].startswith(("beta1_pow", "beta2_pow"))


def _kind(family: Family, layer: str) -> str | None:
    kinds = (kind for pattern, kind in family.tensor_splits.items() if _ends_with(layer, pattern))
    return next(kinds, None)


def _ends_with(layer: str, pattern: str) -> bool:
    return re.search(rf"(^|\.){pattern}$", layer) is not None


def _read(config: Any, name: str | None, default: Any = None) -> Any:
    if name is None:
        return default
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value


def _key_value_columns(family: Family, config: Any) -> Split:
    return Split(_LAST, unit=family.prefix_geometry(config).num_kv_heads)


def _vocabulary(family: Family, config: Any) -> Split:
    return Split(0, unit=_read(config, "vocab_size"))


def _head(family: Family, config: Any) -> Split:
    axis = 0 if _read(config, "tie_word_embeddings", False) else _LAST
    return Split(axis, unit=_read(config, "vocab_size"))


def _query_key_value(family: Family, config: Any) -> Split:
    sizes = family.prefix_geometry(config)
    num_heads = int(_read(config, family.fields.num_heads))
    return Split(_LAST, blocks=(num_heads, sizes.num_kv_heads, sizes.num_kv_heads))


_SPLITS: dict[str, Callable[[Family, Any], Split]] = {
    COLUMNS: lambda family, config: Split(_LAST),
    KEY_VALUE_COLUMNS: _key_value_columns,
    ROWS: lambda family, config: Split(0),
    VOCABULARY: _vocabulary,
    HEAD: _head,
    HALVES: lambda family, config: Split(_LAST, blocks=(1, 1)),
    QUERY_KEY_VALUE: _query_key_value,
}
