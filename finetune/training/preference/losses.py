"""Losses over a chosen and a rejected answer, or over one answer that is good or bad.

All are functions of log ratios, log p(answer | policy) - log p(answer | reference), one for each group of answers.
Definitions are those of TRL 0.24 and, for `dpop`, `or` and `kto_pair`, of PaddleNLP 3.0.0b4. Log-probabilities are
summed over the tokens of an answer with its end token; `AVERAGED` names the losses that take means over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle
import paddle.nn.functional as F

from finetune.settings.alignment import REFERENCE_FREE

AVERAGED = frozenset({"ipo", "orpo", "or", "simpo"})
"""Losses of log-probabilities per token."""
ESTIMATING = frozenset({"kto", "kto_pair"})
"""Losses that compare with an estimate of the divergence from the reference over the whole global batch."""
_SMALLEST_SMOOTHING = 1e-3  # exo_pair takes a logarithm of it


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What a preference loss is computed with; the settings of the same names say what each does."""

    loss_type: str
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    dpop_lambda: float = 50.0
    pref_loss_ratio: float = 1.0
    sft_loss_ratio: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference_free: bool = False
    center_rewards_coefficient: float | None = None

    @property
    def uses_reference(self) -> bool:
        """Whether log-probabilities of the reference model are needed."""
        return not self.reference_free and self.loss_type not in REFERENCE_FREE

    @property
    def estimates_divergence(self) -> bool:
        """Whether a forward pass over the global batch has to come first."""
        return self.loss_type in ESTIMATING

    @property
    def averages(self) -> bool:
        """Whether log-probabilities are means over the tokens of an answer."""
        return self.loss_type in AVERAGED

    @property
    def learns_prompts(self) -> bool:
        """Whether the likelihood beside the preference counts the prompt's tokens, as TRL's ORPO does.

        Not where a prompt's tokens see what they would have to predict (`Family.sees_ahead`).
        """
        return self.loss_type == "orpo" and self.sft_loss_ratio > 0


def _smoothed(margins: paddle.Tensor, smoothing: float) -> paddle.Tensor:
    return -F.log_sigmoid(margins) * (1 - smoothing) - F.log_sigmoid(-margins) * smoothing


def sigmoid(chosen: Any, rejected: Any, settings: LossSettings) -> Any:
    """DPO (Rafailov et al. 2023), with label smoothing the conservative one (Mitchell 2023)."""
    return _smoothed(settings.beta * (chosen - rejected), settings.label_smoothing)


def robust(chosen: Any, rejected: Any, settings: LossSettings) -> Any:
    """Unbiased where a share `label_smoothing` of the pairs is swapped (Chowdhury et al. 2024)."""
    margins, smoothing = settings.beta * (chosen - rejected), settings.label_smoothing
    right, swapped = F.log_sigmoid(margins), F.log_sigmoid(-margins)
    return (smoothing * swapped - (1 - smoothing) * right) / (1 - 2 * smoothing)


def hinge(chosen: Any, rejected: Any, settings: LossSettings) -> Any:
    """SLiC's hinge (Zhao et al. 2023) on DPO's margin."""
    return F.relu(1 - settings.beta * (chosen - rejected))


def ipo(chosen: Any, rejected: Any, settings: LossSettings) -> Any:
    """Azar et al. 2023, on log ratios per token."""
    return (chosen - rejected - 1 / (2 * settings.beta)).square()


def exo_pair(chosen: Any, rejected: Any, settings: LossSettings) -> Any:
    """The reverse divergence of EXO (Ji et al. 2024) for pairs."""
    margins, smoothing = settings.beta * (chosen - rejected), settings.label_smoothing or _SMALLEST_SMOOTHING
    preferred = F.sigmoid(margins) * (F.log_sigmoid(margins) - math.log(1 - smoothing))
    return preferred + F.sigmoid(-margins) * (F.log_sigmoid(-margins) - math.log(smoothing))


def nca_pair(chosen: Any, rejected: Any, settings: LossSettings) -> Any:
    """Noise contrastive alignment (Chen et al. 2024) for pairs."""
    good, bad = settings.beta * chosen, settings.beta * rejected
    return -F.log_sigmoid(good) - 0.5 * F.log_sigmoid(-good) - 0.5 * F.log_sigmoid(-bad)


def sppo_hard(chosen: Any, rejected: Any, settings: LossSettings) -> Any:
    """Self-play preference optimisation (Wu et al. 2024) with certain winners."""
    target = 0.5 / settings.beta
    return (chosen - target).square() + (rejected + target).square()


def apo_zero(chosen: Any, rejected: Any, settings: LossSettings) -> Any:
    """Anchored preference optimisation (D'Oosterlinck et al. 2024): chosen ones up, rejected ones down."""
    return 1 - F.sigmoid(settings.beta * chosen) + F.sigmoid(settings.beta * rejected)


def apo_down(chosen: Any, rejected: Any, settings: LossSettings) -> Any:
    """The same where the model is better than the chosen answers: both down, rejected ones further."""
    return F.sigmoid(settings.beta * chosen) + 1 - F.sigmoid(settings.beta * (chosen - rejected))


def dpop(chosen: Any, rejected: Any, settings: LossSettings) -> Any:
    """DPO-Positive (Pal et al. 2024) as PaddleNLP has it: a chosen answer may not become less likely."""
    fallen = F.relu(-chosen)
    return -F.log_sigmoid(settings.beta * (chosen - rejected)) + settings.dpop_lambda * fallen


def simpo(chosen: Any, rejected: Any, settings: LossSettings) -> Any:
    """SimPO (Meng et al. 2024), on log-probabilities per token."""
    return _smoothed(settings.beta * (chosen - rejected) - settings.simpo_gamma, settings.label_smoothing)


def odds_ratio(chosen: Any, rejected: Any, settings: LossSettings) -> Any:
    """-log sigmoid of the log odds ratio (Hong et al. 2024, eq. 7), on log-probabilities per token."""
    # log(1 - e^x) as log(-expm1(x)): near x = 0 nothing is lost by subtraction.
    odds = chosen - rejected - (_log_complement(chosen) - _log_complement(rejected))
    return -F.log_sigmoid(odds)


def _log_complement(log_probability: Any) -> Any:
    return paddle.log(-paddle.expm1(paddle.clip(log_probability, max=-1e-7)))


def orpo(chosen: Any, rejected: Any, settings: LossSettings) -> Any:
    """The odds ratio times beta, as TRL weights it beside the likelihood."""
    return settings.beta * odds_ratio(chosen, rejected, settings)


PAIR_LOSSES: dict[str, Callable[[Any, Any, LossSettings], Any]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "dpop": dpop,
    "simpo": simpo,
    "cpo": sigmoid,
    "or": odds_ratio,
    "orpo": orpo,
}


def pair_losses(chosen: Any, rejected: Any, settings: LossSettings, divergences: Any = None) -> Any:
    """The loss of each pair.

    Args:
        chosen: float32 [pairs], log ratios of the chosen answers (of `averages`, per token).
        rejected: float32 [pairs], the same of the rejected ones.
        settings: What loss, and with what.
        divergences: float32 [2], for `kto_pair`: estimates from all chosen and from all rejected answers.

    Returns:
        float32 [pairs].
    """
    if settings.loss_type != "kto_pair":
        return PAIR_LOSSES[settings.loss_type](chosen, rejected, settings)
    # PaddleNLP's mean runs over 2n entries: half of both is the loss of a pair.
    of_chosen = 1 - F.sigmoid(settings.beta * (chosen - divergences[1]))
    of_rejected = 1 - F.sigmoid(settings.beta * (divergences[0] - rejected))
    return (of_chosen + of_rejected) / 2


def kto_losses(ratios: Any, is_desirable: Any, settings: LossSettings, divergence: Any) -> Any:
    """KTO (Ethayarajh et al. 2024): the loss of each answer.

    Args:
        ratios: float32 [answers], log ratios.
        is_desirable: float32 [answers], 1 for good answers, 0 for bad ones.
        settings: beta and the weights of both kinds.
        divergence: float32 [], the estimate from answers to other prompts, at least 0.

    Returns:
        float32 [answers].
    """
    signs = 2 * is_desirable - 1
    weights = settings.desirable_weight * is_desirable + settings.undesirable_weight * (1 - is_desirable)
    return weights * (1 - F.sigmoid(settings.beta * signs * (ratios - divergence)))
