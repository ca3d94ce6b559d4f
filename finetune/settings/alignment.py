"""Settings of preference alignment: which loss, and what it is computed with."""

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

from finetune.settings.records import POSITIVE, Range, setting

LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "dpop",
              "kto_pair", "kto", "orpo", "or", "simpo", "cpo", "reward")  # fmt: skip
REWARD = "reward"
"""Trains no policy but a reward model."""
SUPERVISED_BESIDE = ("orpo", "cpo")
"""Losses that have the likelihood of the chosen answers beside them, unless sft_loss_ratio says otherwise."""
REWARD_METRICS = ("loss", "rewards_accuracy", "rewards_margin", "rewards_chosen", "rewards_rejected")
REFERENCE_FREE = frozenset({"orpo", "or", "simpo", "cpo", "reward"})
"""Losses that know no reference model."""
START, BASE = "start", "base"
"""Words for the reference: the weights as the run finds them with its adapter, or without any."""
METRICS = ("loss", "rewards_accuracy", "rewards_margin", "rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected")  # fmt: skip

_KTO_ALONE = ("desirable_weight", "undesirable_weight")
_SIGNS = (
    "beta",
    "label_smoothing",
    "simpo_gamma",
    "dpop_lambda",
    "pref_loss_ratio",
    "sft_loss_ratio",
    "reference_free",
)
_FACTOR = Range(0, 10**6)
_REWARD_FILE = re.compile(r"rm(_.*)?\.(json|ya?ml)$")
_USED_BY = {
    "beta": frozenset(LOSS_TYPES) - {"or", REWARD},
    "label_smoothing": frozenset({"sigmoid", "robust", "exo_pair", "simpo", "cpo"}),
    "simpo_gamma": frozenset({"simpo"}),
    "dpop_lambda": frozenset({"dpop"}),
    "desirable_weight": frozenset({"kto"}),
    "undesirable_weight": frozenset({"kto"}),
}
"""The losses that use a setting."""
_DROPOUTS = ("lora_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")

# One row per setting: default, help, help in Chinese, further facts.
# fmt: off


@dataclass(kw_only=True)
class AlignmentArguments:
    """Training on preferences; loss_type makes a run one of alignment."""

    loss_type: str | None = setting(None,
        "Train on preferences with this loss: sigmoid (DPO), hinge, ipo, robust, exo_pair, nca_pair, sppo_hard, "
        "apo_zero, apo_down, dpop, kto_pair, orpo, or, simpo and cpo on pairs, kto on single answers; reward: train a "
        "reward model on pairs; null: supervised fine-tuning.",
        "以此损失在偏好数据上训练：sigmoid（DPO）、hinge、ipo、robust、exo_pair、nca_pair、sppo_hard、apo_zero、apo_down、"
        "dpop、kto_pair、orpo、or、simpo、cpo 用成对回答，kto 用单个回答；reward：用成对回答训练奖励模型；"
        "null：监督微调。", choices=LOSS_TYPES)
    beta: float = setting(0.1, "How closely the model is held to the reference; for orpo the weight of the odds ratio.",
        "对参考模型的约束强度；orpo 中为优势比项的权重。", range=POSITIVE)
    label_smoothing: float = setting(0.0, "Share of the pairs that may be the wrong way round (sigmoid, robust, "
        "exo_pair, simpo, cpo).", "可能标反的成对数据所占比例（sigmoid、robust、exo_pair、simpo、cpo）。",
        range=Range(0, 0.5, high_allowed=False, is_interval=True))
    simpo_gamma: float = setting(0.5, "Margin that simpo asks of the rewards.", "simpo 要求的奖励差。", range=_FACTOR)
    dpop_lambda: float = setting(50.0, "Weight of dpop's penalty on chosen answers that become less likely.",
        "dpop 对较优回答概率下降的惩罚权重。", range=_FACTOR)
    pref_loss_ratio: float = setting(1.0, "Weight of the preference loss.", "偏好损失的权重。", range=_FACTOR)
    sft_loss_ratio: float | None = setting(None,
        "Weight of the loss of supervised fine-tuning on the chosen answers beside it; null: 1 for orpo (which counts "
        "the prompt too) and cpo, else 0.",
        "在较优回答上的监督微调损失的权重；null：orpo（提示也计入）和 cpo 为 1，其余为 0。", range=_FACTOR)
    reference_free: bool = setting(False, "Without a reference model: the policy's own log-probabilities count.",
        "不用参考模型：只用策略模型自身的对数概率。")
    reference_model: str = setting(START,
        "Whose log-probabilities the answers are compared with: start, the model as the run finds it, with the adapter "
        "in lora_path or prefix_path; base, the same without an adapter; or the folder or name of another model with "
        "the same tokenizer, which is asked once before training and released.",
        "与之比较的参考模型：start 为训练开始时的模型（含 lora_path 或 prefix_path 的适配器）；base 为不含适配器的同一模型；"
        "也可写另一个使用相同分词器的模型的目录或名称，训练前计算一次后即释放。", is_path=True)
    ref_model_update_steps: int = setting(-1, "Steps after which the reference follows the policy; -1: never.",
        "参考模型每隔多少步更新；-1：从不。", common=False, range=Range(-1, 10**9), working=(-1,),
        instead="the reference is the model at the start; train in rounds, each from the result of the last, for one "
        "that moves")
    center_rewards_coefficient: float | None = setting(None,
        "Weight of the squared sum of both rewards in the loss of a reward model, which keeps them around 0; null: none.",
        "奖励模型损失中两个奖励之和的平方的权重，使奖励保持在 0 附近；null：无。", range=_FACTOR)
    disable_dropout: bool = setting(True,
        "Preference methods train without dropout, that of the model and of LoRA, as TRL and PaddleNLP do; false: with "
        "it.", "偏好方法训练时不用 dropout（模型的和 LoRA 的），与 TRL 和 PaddleNLP 相同；false：使用。", common=False)
    desirable_weight: float = setting(1.0, "Weight of good answers in kto.", "kto 中好回答的权重。", range=_FACTOR)
    undesirable_weight: float = setting(1.0, "Weight of bad answers in kto.", "kto 中差回答的权重。", range=_FACTOR)


# fmt: on


def infer_loss_type(
    values: MutableMapping[str, Any], given: frozenset[str], written: Mapping[str, Any], file_name: str = ""
) -> list[str]:
    """Settles the loss where a file of PaddleNLP's leaves it to the script: its KTO and reward files name none.

    Args:
        values: Every setting by name.
        given: Names that were set.
        written: What stands in the file and on the command line; a loss_type of null there means none.
        file_name: Of the argument file; the settings of PaddleNLP's reward files could be those of any other method.
    """
    if values["loss_type"] is not None or "loss_type" in written:
        return []
    for names, loss_type in ((_KTO_ALONE, "kto"), (_SIGNS, "sigmoid")):
        if signs := [name for name in names if name in given]:
            values["loss_type"] = loss_type
            return [f"loss_type is taken to be {loss_type}, because {signs[0]} is given"]
    if _REWARD_FILE.match(file_name):
        values["loss_type"] = REWARD
        return [f"loss_type is taken to be {REWARD}, because the file is called {file_name}"]
    return []


def has_reference(values: Mapping[str, Any]) -> bool:
    """Whether the loss compares with a reference model."""
    loss_type = values["loss_type"]
    return loss_type is not None and not values["reference_free"] and loss_type not in REFERENCE_FREE


def resolve_alignment(values: MutableMapping[str, Any], given: frozenset[str]) -> list[str]:
    """Settles the share of supervised fine-tuning; returns what is given and has no effect."""
    if values["sft_loss_ratio"] is None:
        values["sft_loss_ratio"] = 1.0 if values["loss_type"] in SUPERVISED_BESIDE else 0.0
    return [] if values["loss_type"] is None else [*_find_ineffective(values, given)]


def _find_ineffective(values: Mapping[str, Any], given: frozenset[str]) -> Iterator[str]:
    """One line for each setting that is given and that the loss does not use."""
    loss_type = values["loss_type"]
    for name, users in _USED_BY.items():
        default = next(field.default for field in fields(AlignmentArguments) if field.name == name)
        if name in given and values[name] != default and loss_type not in users:
            yield (
                f"{name} {values[name]:g} has no effect with loss_type {loss_type}: "
                f"it is for {', '.join(each for each in LOSS_TYPES if each in users)}"
            )
    for name in _DROPOUTS if values["disable_dropout"] else ():
        if name in given and values[name]:
            yield (
                f"{name} {values[name]:g} has no effect with loss_type {loss_type}: preference methods train without "
                "dropout, as in TRL and PaddleNLP; disable_dropout false trains with it"
            )


def check_alignment(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What the settings of alignment cannot be together with, as (names, fault)."""
    loss_type = values["loss_type"]
    if loss_type is None:
        return
    for name, remedy in _CONFLICTS.items():
        if values[name]:
            yield (
                ("loss_type", name),
                f"loss_type is {loss_type} and {name} is {_shown(values[name])}: {remedy}",
            )
    if values["reference_model"] != START and not has_reference(values):
        why = "reference_free is true" if values["reference_free"] else f"loss_type {loss_type} knows none"
        yield (
            ("loss_type", "reference_model", "reference_free"),
            f"reference_model is {values['reference_model']}, but {why}: remove reference_model",
        )
    yield from _check_rewards(values)
    if not (values["pref_loss_ratio"] or values["sft_loss_ratio"]):
        yield (
            ("pref_loss_ratio", "sft_loss_ratio"),
            "pref_loss_ratio and sft_loss_ratio are both 0: nothing would be learned, raise one of them",
        )


def _check_rewards(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What only some losses have."""
    loss_type = values["loss_type"]
    for name in _ABSENT.get(loss_type, ()):
        if values[name]:
            yield (("loss_type", name), f"loss_type is {loss_type}, which has no {name}: remove it")
    if loss_type == REWARD and values["prefix_tuning"]:
        yield (
            ("loss_type", "prefix_tuning"),
            "loss_type is reward and prefix_tuning is true: a prefix is saved without a head, use LoRA (lora true) or "
            "full fine-tuning",
        )
    if loss_type != REWARD and values["center_rewards_coefficient"]:
        yield (
            ("loss_type", "center_rewards_coefficient"),
            f"center_rewards_coefficient is for reward models and loss_type is {loss_type}: remove it, or set loss_type "
            "to reward",
        )


_ABSENT = {"kto": ("sft_loss_ratio", "reference_free"), REWARD: ("sft_loss_ratio", "reference_free")}
_CONFLICTS = {
    "lazy": "preference data are held in memory, remove lazy",
    "eval_with_do_generation": "pairs are evaluated by their rewards; generate from the result with "
    "predict_generation.py",
    "preference": "preference is for supervised fine-tuning on the chosen answers, remove one of them",
    "self_cognition_samples": "these have no rejected answers, set it to 0",
}


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
