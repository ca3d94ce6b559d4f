"""Trains on preferences with TRL's losses over transformers and peft, in float32 on CPU.

    python -m tests.reference.preference_training               # rewrites golden_preferences.json
    python -m tests.reference.preference_training sppo_hard     # of these cases only

It needs torch, transformers, peft and trl beside this project's packages (requirements/parity.txt). TRL's trainers are
not run: their losses are called, as they stand, from a loop that is written out here. Shared with this project are the
starting weights, the token ids and the order of the samples. The reference model is a second copy here.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
import trl

from tests.reference.chatglm2_qwen_published import PUBLISHED
from tests.reference.chatglm2_qwen_training import ReferenceModel
from tests.reference.curves import NUM_STEPS
from tests.reference.preference_curves import (
    CASES,
    GOLDEN_PREFERENCES,
    PreferenceCase,
    build_policy,
    build_policy_adapter,
)
from tests.reference.transformers_training import (
    IGNORED,
    add_reference_lora,
    decay_groups,
    learning_rate_factor,
    load_reference_model,
    sample_order,
)

_PER_TOKEN = ("ipo", "orpo", "simpo")
_WITHOUT_REFERENCE = ("orpo", "simpo", "cpo")


class Rows:
    """Prompts with one answer each, padded.

    Args:
        texts: (prompt ids, answer ids).
    """

    def __init__(self, texts: Sequence[tuple[Any, Any]]):
        length = max(len(prompt) + len(answer) for prompt, answer in texts)
        self.ids = torch.zeros(len(texts), length, dtype=torch.long)
        self.mask = torch.zeros(len(texts), length, dtype=torch.long)
        self.labels = torch.full((len(texts), length), IGNORED)
        for row, (prompt, answer) in enumerate(texts):
            text = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
            self.ids[row, : len(text)], self.mask[row, : len(text)] = text, 1
            self.labels[row, len(prompt) : len(text)] = text[len(prompt) :]

    def logits(self, model: Any) -> torch.Tensor:
        return model(input_ids=self.ids, attention_mask=self.mask).logits.float()

    def log_probabilities(self, logits: torch.Tensor, *, per_token: bool) -> torch.Tensor:
        """[rows], as TRL computes them."""
        return trl.ORPOTrainer.get_batch_logps(logits, self.labels, average_log_prob=per_token)

    def likelihood(self, logits: torch.Tensor, *, with_prompt: bool) -> torch.Tensor:
        """Mean loss of the answers' tokens, or of all tokens as ORPO takes it."""
        every = torch.where(self.mask == 1, self.ids, IGNORED)
        labels = every if with_prompt else self.labels
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _trainer_facts(case: PreferenceCase, arguments: dict[str, Any]) -> SimpleNamespace:
    """What TRL's losses read of their trainer."""
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value)
    return SimpleNamespace(
        accelerator=accelerator,
        beta=arguments["beta"],
        label_smoothing=arguments.get("label_smoothing", 0.0),
        reference_free=arguments.get("reference_free", False),
        f_divergence_type="reverse_kl",
        f_divergence_params=None,
        loss_type={"cpo": "sigmoid"}.get(case.loss_type, case.loss_type),
        simpo_gamma=arguments.get("simpo_gamma", 0.5),
        alpha=0.0,
        calculate_KL=True,
        desirable_weight=arguments.get("desirable_weight", 1.0),
        undesirable_weight=arguments.get("undesirable_weight", 1.0),
    )


def pair_loss(
    case: PreferenceCase, arguments: dict[str, Any], model: Any, reference: Any, batch: list
) -> torch.Tensor:
    """The loss of pairs."""
    facts, per_token = _trainer_facts(case, arguments), case.loss_type in _PER_TOKEN
    chosen, rejected = (Rows([(each.prompt_ids, each.answers[place]) for each in batch]) for place in (0, 1))
    logits = chosen.logits(model)
    good = chosen.log_probabilities(logits, per_token=per_token)
    bad = rejected.log_probabilities(rejected.logits(model), per_token=per_token)
    if case.loss_type == "orpo":
        ratio = trl.ORPOTrainer.odds_ratio_loss(facts, good, bad)[0]
        return chosen.likelihood(logits, with_prompt=True) - ratio.mean()
    if case.loss_type in _WITHOUT_REFERENCE:
        losses = trl.CPOTrainer.cpo_loss(facts, good, bad)[0]
        weight = 1.0 if case.loss_type == "cpo" else 0.0
        return losses.mean() + weight * chosen.likelihood(logits, with_prompt=False)
    with torch.no_grad():
        held = [
            rows.log_probabilities(rows.logits(reference), per_token=per_token) for rows in (chosen, rejected)
        ]
    losses = trl.DPOTrainer.dpo_loss(facts, good, bad, *held, facts.loss_type)[0]
    weight = arguments.get("sft_loss_ratio", 0.0)
    return losses.mean() + weight * chosen.likelihood(logits, with_prompt=False)


def marked_loss(
    case: PreferenceCase, arguments: dict[str, Any], model: Any, reference: Any, samples: list
) -> torch.Tensor:
    """KTO's loss of all samples in one batch; the answers are shifted by one for the divergence."""
    rows = Rows([(each.prompt_ids, each.answers[0]) for each in samples])
    shifted = [samples[-1], *samples[:-1]]
    others = Rows([(own.prompt_ids, other.answers[0]) for own, other in zip(samples, shifted, strict=True)])
    policy = rows.log_probabilities(rows.logits(model), per_token=False)
    with torch.no_grad():
        held = rows.log_probabilities(rows.logits(reference), per_token=False)
        divergence = [
            others.log_probabilities(others.logits(each), per_token=False) for each in (model, reference)
        ]
    is_good = torch.tensor([each.desirable for each in samples])
    parts = (policy[is_good], policy[~is_good], divergence[0], held[is_good], held[~is_good], divergence[1])
    return trl.KTOTrainer.kto_loss(_trainer_facts(case, arguments), *parts)[0].mean()


def train_case(case: PreferenceCase, folder: Path, adapter: Path | None) -> list[dict[str, float]]:
    """Loss, gradient norm and learning rate of every step."""
    arguments = case.arguments(lora=adapter is not None)
    samples = read_samples(case, arguments, folder)
    model = build_reference(case.family, folder, adapter)
    reference = copy.deepcopy(model).eval()
    if arguments.get("reference_model") == "base":
        reference.disable_adapter_layers()  # as in the context in which TRL asks a model that peft holds
    model.train()
    groups = decay_groups(model, arguments["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=arguments["learning_rate"], betas=(0.9, 0.999), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, arguments)
    )
    curve, batch_size = [], 8
    for step in range(NUM_STEPS):
        order = sample_order(len(samples), step, batch_size, arguments["seed"])
        if case.is_marked:
            loss = marked_loss(case, arguments, model, reference, samples)
        else:
            loss = pair_loss(case, arguments, model, reference, [samples[number] for number in order])
        loss.backward()
        trained = [each for group in groups for each in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, arguments["max_grad_norm"])
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate})
    return curve


def build_reference(family: str, folder: Path, adapter: Path | None) -> Any:
    """The tiny model in transformers, its adapter in peft; or the model written here of a family that it lacks."""
    if family in PUBLISHED:
        return ReferenceModel(folder, family, adapter)
    model = load_reference_model(folder, family)
    return model if adapter is None else add_reference_lora(model, adapter, family=family)


def read_samples(case: PreferenceCase, arguments: dict[str, Any], folder: Path) -> list:
    """The samples as token ids, read by this project."""
    from finetune.data.reading.splits import find_sources
    from finetune.families.family import get_family
    from finetune.run.preference_data import read_preference_samples
    from finetune.settings.arguments import parse_arguments
    from finetune.tokenizers.encoder import FamilyEncoder
    from finetune.tokenizers.loading import load_tokenizer

    with tempfile.TemporaryDirectory() as name:
        given = {
            "model_name_or_path": str(folder),
            "dataset_name_or_path": str(case.data()),
            "output_dir": name,
        }
        file = Path(name) / "arguments.json"
        file.write_text(json.dumps(arguments | given))
        args = parse_arguments([str(file)])
        encoder: Any = FamilyEncoder(load_tokenizer(folder), get_family(case.family))
        files = find_sources(args.data, training=True, evaluating=False)
        pair: Any = SimpleNamespace(encoder=encoder)
        comparison = "marked" if case.is_marked else "pairs"
        return list(read_preference_samples(args, files, pair, comparison=comparison).train)


def reference_curves(names: Sequence[str] = tuple(CASES)) -> dict[str, list[dict[str, float]]]:
    """The curves of cases, with "_lora" behind the names of those of LoRA."""
    torch.manual_seed(0)
    curves = {}
    with tempfile.TemporaryDirectory() as name:
        for case in map(CASES.__getitem__, names):
            folder = Path(name) / case.family
            adapter = Path(name) / f"{case.family}_adapter"
            if not folder.exists():
                build_policy_adapter(adapter, build_policy(folder, case.family), case.family)
            if not case.only_lora:
                curves[case.name] = train_case(case, folder, None)
            curves[f"{case.name}_lora"] = train_case(case, folder, adapter)
    return curves


def main() -> int:
    """Writes the golden values that are compared with where TRL is not installed."""
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    names = sys.argv[1:] or [*CASES]
    known = json.loads(GOLDEN_PREFERENCES.read_text())["curves"] if sys.argv[1:] else {}
    golden = {"made_with": made_with, "curves": known | reference_curves(names)}
    GOLDEN_PREFERENCES.write_text(json.dumps(golden, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
