"""Trains reward models with TRL's loss over transformers and peft, in float32 on CPU.

    python -m tests.reference.reward_training       # rewrites golden_rewards.json

It needs torch, transformers, peft and trl beside this project's packages (requirements/parity.txt). The loss is
`RewardTrainer.compute_loss` of TRL as it stands, over transformers' LlamaForSequenceClassification; the loop is written
out here. Shared with this project are the starting weights, the token ids and the order of the samples.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
from safetensors.numpy import load_file

from tests.reference.curves import LORA_RANK, NUM_STEPS
from tests.reference.preference_curves import PreferenceCase, build_policy
from tests.reference.preference_training import read_samples
from tests.reference.reward_curves import (
    CASES,
    GOLDEN_REWARDS,
    HEAD,
    RewardCase,
    build_reward_adapter,
    draw_head,
)
from tests.reference.transformers_training import (
    REFERENCES,
    decay_groups,
    learning_rate_factor,
    load_reference_model,
    sample_order,
)

PADDING = 599
"""A token that no sample has: transformers takes the value of the last token that is no padding."""


def build_reference(folder: Path, seed: int, adapter: Path | None) -> Any:
    """transformers' model with the head that a run of this project starts from."""
    causal = load_reference_model(folder)
    config = copy.deepcopy(causal.config)
    config.num_labels, config.pad_token_id = 1, PADDING
    model = transformers.LlamaForSequenceClassification(config)
    model.model.load_state_dict(causal.model.state_dict())
    tensors = {} if adapter is None else load_file(adapter / "weights.safetensors")
    head = tensors.pop(HEAD) if adapter else draw_head(config.hidden_size, seed)
    model.score.weight.data = torch.from_numpy(head.T.copy())
    model = model.float()
    return model if adapter is None else _with_adapter(model, tensors)


def _with_adapter(model: Any, tensors: dict[str, Any]) -> Any:
    """peft's model for sequence classification, which trains the head beside the same LoRA matrices."""
    from peft import LoraConfig, get_peft_model

    reference = REFERENCES["llama"]
    config = LoraConfig(
        task_type="SEQ_CLS", r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(reference.lora_layers)
    )
    adapted = get_peft_model(model, config)
    parameters = dict(adapted.named_parameters())
    for name, array in tensors.items():
        layer, _, part = f"base_model.model.{reference.rename(name)}".rpartition(".")
        parameters[f"{layer}.{part}.default.weight"].data = torch.from_numpy(array.T.copy())
    trained = [name for name, each in parameters.items() if each.requires_grad]
    assert len(trained) == len(tensors) + 1, "the matrices and the head"
    return adapted


def train_case(case: RewardCase, folder: Path, data: Path, adapter: Path | None) -> list[dict[str, float]]:
    """Loss, gradient norm and learning rate of every step."""
    arguments = case.arguments(lora=adapter is not None)
    samples = read_pairs(case, arguments, folder, data)
    model = build_reference(folder, arguments["seed"], adapter)
    model.train()
    groups = decay_groups(model, arguments["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=arguments["learning_rate"], betas=(0.9, 0.999), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, arguments)
    )
    # What TRL's loss reads of its trainer.
    coefficient = arguments.get("center_rewards_coefficient")
    trainer = SimpleNamespace(args=SimpleNamespace(center_rewards_coefficient=coefficient))
    curve = []
    for step in range(NUM_STEPS):
        batch = [samples[number] for number in sample_order(len(samples), step, 8, arguments["seed"])]
        loss, values = trl.RewardTrainer.compute_loss(trainer, model, _collate(batch), return_outputs=True)
        margins = (values["rewards_chosen"] - values["rewards_rejected"]).detach()
        loss.backward()
        trained = [each for group in groups for each in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, arguments["max_grad_norm"])
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.append(
            {
                "loss": loss.item(),
                "grad_norm": norm.item(),
                "learning_rate": rate,
                "rewards_margin": margins.mean().item(),
                "rewards_accuracy": (margins > 0).float().mean().item(),
            }
        )
    return curve


def _collate(samples: list[Any]) -> dict[str, Any]:
    """The inputs of TRL's loss; margins as a column, since it takes them from rewards [pairs, 1]."""
    inputs: dict[str, Any] = {}
    for place, kind in enumerate(("chosen", "rejected")):
        texts = [torch.tensor([*each.prompt_ids.tolist(), *each.answers[place].tolist()]) for each in samples]
        assert not any((text == PADDING).any() for text in texts)
        rows = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PADDING)
        inputs |= {f"input_ids_{kind}": rows, f"attention_mask_{kind}": (rows != PADDING).long()}
    inputs["margin"] = torch.tensor([[each.margin] for each in samples], dtype=torch.float32)
    return inputs


def read_pairs(case: RewardCase, arguments: dict[str, Any], folder: Path, data: Path) -> list:
    """The samples as token ids, read by this project."""

    class Source(PreferenceCase):
        def data(self) -> Path:
            return data

    return read_samples(Source(case.name, "reward"), arguments, folder)


def reference_curves() -> dict[str, list[dict[str, float]]]:
    """The curves of all cases, with "_lora" behind the names of those of LoRA."""
    torch.manual_seed(0)
    curves = {}
    with tempfile.TemporaryDirectory() as name:
        folder = build_policy(Path(name) / "llama")
        adapter = build_reward_adapter(Path(name) / "adapter", folder)
        for case in CASES.values():
            data = case.write_data(Path(name) / case.name)
            curves[case.name] = train_case(case, folder, data, None)
            curves[f"{case.name}_lora"] = train_case(case, folder, data, adapter)
    return curves


def main() -> int:
    """Writes the golden values that are compared with where TRL is not installed."""
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    golden = {"made_with": made_with, "curves": reference_curves()}
    GOLDEN_REWARDS.write_text(json.dumps(golden, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
