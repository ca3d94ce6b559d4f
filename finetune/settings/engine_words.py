"""Words with which settings such as `pipeline_parallel_config` tune the engines, and which of them are refused.

What a word that is not refused does, and which ones ask for what is always so, stands in docs/parallel.md. Words of an
axis that a run does not have say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.settings.degrees import layout_of
from finetune.settings.model import FROZEN_PARTS
from finetune.settings.sharding_words import SLICE_WORDS, check_sharding_words

Faults = Iterator[tuple[tuple[str, ...], str]]

_AT_END = (
    "the owners of whole parameters at stage 1 sum over replicas at the end of a step: add split_param to "
    "sharding_parallel_config, or"
)
_TWO_DTYPES = (
    "Paddle's backward passes with this word fail under fp16_opt_level O1, where weights and activations have two "
    "dtypes: set fp16_opt_level O2, or"
)
_STATIC = "it is for PaddleNLP's static graphs"
_COMPARED = (
    "what it would broadcast is the same on all tensor ranks to the bit, which replica_check_steps compares; "
    "a broadcast would hide the fault"
)

_REFUSED = {
    "pipeline_parallel_config": {
        "best_unbalanced_scheduler": "virtual stages run in one order, which takes any number of micro-batches",
        "enable_send_recv_overlap": _STATIC,
        "enable_split_backward": _STATIC,
        "enable_timer": "Fleet's timers of a pipeline's parts are not shown",
        "use_dualpipev": "pipelines run in the order of 1F1B",
    },
    "tensor_parallel_config": {
        "enable_mp_fused_linear_param_grad_add": (
            "the CUDA kernel adds to a weight's gradient where no hook sees that it is complete, and no test here can "
            "run it"
        ),
        "replace_with_c_embedding": _STATIC,
        "replace_with_parallel_cross_entropy": _STATIC,
        "sync_grad": _COMPARED,
        "sync_moment": _COMPARED,
        "sync_param": _COMPARED,
    },
}
_DEGREES = {
    "pipeline_parallel_config": "pipeline_parallel_degree",
    "tensor_parallel_config": "tensor_parallel_degree",
}
_OF_SHARDING = ("sharding_parallel_config", "pipeline_parallel_config", "data_parallel_config")
_OF_LAYERS = ("enable_mp_async_allreduce", "enable_mp_skip_c_identity", "enable_sp_async_reduce_scatter")


def split_words(text: str | None) -> list[str]:
    """The words of such a setting, which blanks or commas separate."""
    return [word for word in re.split(r"[\s,]+", text or "") if word]


def check_engine_words(values: Mapping[str, Any]) -> Faults:
    """The faults of words that ask for what the engines do not do, each with the settings it depends on.

    Args:
        values: Settings by name.
    """
    for name, refused in _REFUSED.items():
        if values[_DEGREES[name]] > 1:
            for word in sorted(set(split_words(values[name])) & set(refused)):
                yield _fault(name, word, _DEGREES[name], refused[word])
    if values["tensor_parallel_degree"] > 1:
        yield from _check_tensor_words(values)
    if values["pipeline_parallel_degree"] > 1:
        yield from _check_overlap(values)
        yield from _check_messages(values)
    words = {name: set(split_words(values[name])) for name in _OF_SHARDING}
    for name, word, other, reason in check_sharding_words(values, words):
        yield _fault(name, word, other, reason)


def _check_tensor_words(values: Mapping[str, Any]) -> Faults:
    """Words that reach Fleet's layers, where the run has other layers, or none that would look at them."""
    name = "tensor_parallel_config"
    given = set(split_words(values[name]))
    methods = [method for method in ("lora", "prefix_tuning") if values[method]]
    frozen = [part for part in FROZEN_PARTS if values[part]]
    for word in (each for each in _OF_LAYERS if each in given):
        is_of_sequences = word == "enable_sp_async_reduce_scatter"
        if frozen:
            reason = "Paddle's backward passes with this word fail at such a weight"
            yield _fault(name, word, frozen[0], f"{frozen[0]} leaves weights untrained: {reason}")
        elif (values["bf16"] or values["fp16"]) and values["fp16_opt_level"] == "O1":
            yield _fault(name, word, "fp16_opt_level", _TWO_DTYPES)
        elif methods:
            reason = (
                "it makes backward passes of whole weights run beside sums, and this method trains none in the layers "
                "that have such sums"
            )
            yield _fault(name, word, methods[0], reason)
        elif is_of_sequences and not values["sequence_parallel"]:
            yield _fault(
                name, word, "sequence_parallel", "sequence_parallel is false, so that no layer scatters rows"
            )
        elif not is_of_sequences and values["sequence_parallel"]:
            reason = (
                "under sequence_parallel the layers scatter rows in the place of these sums: "
                "enable_sp_async_reduce_scatter is the word for that"
            )
            yield _fault(name, word, "sequence_parallel", reason)
        elif word == "enable_mp_skip_c_identity" and "enable_mp_async_allreduce" not in given:
            reason = (
                "Paddle's layers look at it together with enable_mp_async_allreduce only: add that word, or"
            )
            yield ((name,), f'{name} holds "{word}", but {reason} remove this one')


def _check_overlap(values: Mapping[str, Any]) -> Faults:
    """Gradient sums of replicas that a pipeline's word wants beside its passes."""
    name, word = "pipeline_parallel_config", "enable_dp_comm_overlap"
    layout = layout_of(values)
    if word not in split_words(values[name]) or layout is None or layout.data == 1:
        return
    owns_whole = layout.sharding > 1 and "stage1" in values["sharding"].split()
    if owns_whole and not SLICE_WORDS & set(split_words(values["sharding_parallel_config"])):
        yield _fault(name, word, "sharding", _AT_END)
    elif "gradient_sync_after_accumulate" in split_words(values["data_parallel_config"]):
        reason = "data_parallel_config holds gradient_sync_after_accumulate, the contrary"
        yield _fault(name, word, "data_parallel_config", reason)


def _check_messages(values: Mapping[str, Any]) -> Faults:
    """A word for batched messages, where there are none."""
    name, word = "pipeline_parallel_config", "disable_non_batch_p2p_comm"
    given = set(split_words(values[name]))
    if word in given and (values["virtual_pp_degree"] or 1) > 1:
        reason = "virtual stages hand hidden states on in single messages, which run beside the computing"
        yield _fault(name, word, "virtual_pp_degree", reason)
    elif word in given and (
        contrary := sorted(given & {"disable_batch_p2p_comm", "enable_overlap_p2p_comm"})
    ):
        yield ((name,), f'{name} holds "{word}" and its contrary "{contrary[0]}": remove one of them')


def _fault(name: str, word: str, other: str, reason: str) -> tuple[tuple[str, ...], str]:
    remedy = " remove the word" if reason.endswith(", or") else ": remove the word"
    return (name, other), f'{name} holds "{word}", but {reason}{remedy}'
