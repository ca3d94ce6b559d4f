"""What config.json of Baichuan's folders leaves unsaid: the generation, and how positions are told.

All of them have one `model_type`. Models of 7B turn heads by their positions; those of 13B add distances to the scores
(ALiBi), and their files have `model_max_length` alone. Baichuan 2 divides the output layer's weights by their length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.gated_decoder import require_values
from finetune.families.rotary_config import check_head_dim, without_scaling

FIRST, SECOND = 64000, 125696
"""Vocabulary of each generation."""
DISTANCES, NORMED_HEAD = "has_distances", "normed_head"
"""Fields of ours."""


def is_second(config: Mapping[str, Any]) -> bool | None:
    """Whether a config.json is of Baichuan 2; None where it does not tell."""
    if NORMED_HEAD in config:
        return bool(config[NORMED_HEAD])
    if "z_loss_weight" in config:
        return True
    return {FIRST: False, SECOND: True}.get(config.get("vocab_size", 0))


def adapt_config(config: dict[str, Any], *, normed_head: bool) -> dict[str, Any]:
    """Says what the files leave unsaid; refuses what the layers do not compute."""
    require_values(config, "Baichuan", hidden_act="silu", tie_word_embeddings=False)
    check_head_dim(config)
    adapted = without_scaling(config)
    adapted.setdefault(DISTANCES, "max_position_embeddings" not in config)
    if "max_position_embeddings" not in adapted and "model_max_length" in adapted:
        adapted["max_position_embeddings"] = adapted["model_max_length"]
    return adapted | {NORMED_HEAD: normed_head}


def published_config(config: dict[str, Any], *, architecture: str) -> dict[str, Any]:
    """A configuration in the fields of the published folders; the generation stays said."""
    published = {name: value for name, value in config.items() if name != DISTANCES}
    published |= {"model_type": "baichuan", "architectures": [architecture]}
    if config.get("max_position_embeddings"):
        published["model_max_length"] = config["max_position_embeddings"]
    if config.get(DISTANCES):
        published.pop("max_position_embeddings", None)
    return published
