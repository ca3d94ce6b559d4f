"""Words with which `sharding_parallel_config` tunes sharding, and which of them are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Reasons = Iterator[tuple[str, str, str, str]]

SLICE_WORDS = frozenset({"enable_stage1_allgather_overlap", "enable_stage1_tensor_fusion", "split_param"})
"""Words with which stage 1 updates slices of parameters in the place of whole ones: what they ask for is done there."""

_NAME = "sharding_parallel_config"
_SEMI_AUTOMATIC = "it is for PaddleNLP's semi-automatic parallelism"
_REFUSED = {
    "enable_fuse_optimizer_states": "a checkpoint holds the optimizer state of each parameter under its name",
    "enable_overlap": _SEMI_AUTOMATIC,
    "enable_tensor_fusion": _SEMI_AUTOMATIC,
}
_STAGE1_WORDS = ("disable_stage1_reduce_avg", "enable_stage1_broadcast_overlap", "enable_stage1_overlap")
_STAGE_OF = dict.fromkeys((*SLICE_WORDS, *_STAGE1_WORDS), "stage1") | {"enable_stage2_overlap": "stage2"}


def check_sharding_words(values: Mapping[str, Any], words: Mapping[str, set[str]]) -> Reasons:
    """What is wrong with the words of a run with sharding.

    Args:
        values: Settings by name.
        words: Those of `sharding_parallel_config`, `pipeline_parallel_config` and `data_parallel_config`.

    Yields:
        The setting, its word, the other setting that it does not go with, the reason.
    """
    stages, given = (values["sharding"] or "").split(), words[_NAME]
    if not stages:
        return
    waits = "gradient_sync_after_accumulate" in words["data_parallel_config"]
    contrary = "data_parallel_config holds gradient_sync_after_accumulate, the contrary"
    for word in sorted(given):
        stage = _STAGE_OF.get(word)
        if word in _REFUSED:
            yield _NAME, word, "sharding", _REFUSED[word]
        elif stage and stage not in stages:
            yield _NAME, word, "sharding", f'it is for {stage} and sharding is "{values["sharding"]}"'
        elif waits and word.endswith("_overlap"):
            yield _NAME, word, "data_parallel_config", contrary
    name, word = "pipeline_parallel_config", "enable_sharding_comm_overlap"
    if waits and values["pipeline_parallel_degree"] > 1 and word in words[name]:
        yield name, word, "data_parallel_config", contrary
