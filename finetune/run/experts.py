"""Whether a run spreads tokens over the experts of its model, and what refuses that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.run.alignment import comparison_of

if TYPE_CHECKING:
    from finetune.models.resolve import ResolvedModel
    from finetune.processes.groups import ProcessGroups
    from finetune.settings.arguments import Arguments
    from finetune.training.expert_balance import ExpertBalance


def check_balance(args: Arguments, resolved: ResolvedModel) -> None:
    """Compares `router_aux_loss_coef` with the model and the method, before weights are read.

    Raises:
        UserError: The model has no experts, or the method has no loss that spreads tokens over them.
    """
    given = args.model.router_aux_loss_coef
    field = resolved.family.fields.experts
    if field is None:
        if given:
            raise UserError(
                f"router_aux_loss_coef is {given}, but a model of family {resolved.family.name} has no experts: "
                "leave it away"
            )
        return
    coefficient = _coefficient(args, resolved.family.adapt_config(resolved.config))
    if coefficient and comparison_of(args) is not None:
        raise UserError(
            f"router_aux_loss_coef is {coefficient}, but no loss spreads tokens over experts where answers are "
            "compared: set router_aux_loss_coef to 0"
        )


def build_balance(args: Arguments, base: Any, groups: ProcessGroups) -> ExpertBalance | None:
    """What spreads tokens over the experts of a model; None where nothing does.

    Args:
        args: The run's settings.
        base: This rank's part of the model, without an adapter.
        groups: The run's process groups.
    """
    facts = getattr(getattr(base, "facts", None), "experts", None)
    if facts is None:
        return None
    coefficient = _coefficient(args, vars(base.config))
    if not coefficient:
        return None
    from finetune.training.expert_balance import ExpertBalance

    return ExpertBalance(base, facts.num_routed, coefficient, groups)


def _coefficient(args: Arguments, config: Mapping[str, Any]) -> float:
    given = args.model.router_aux_loss_coef
    if given is not None:
        return float(given)
    return float(config.get("router_aux_loss_coef") or 0.0) if config.get("output_router_logits") else 0.0
