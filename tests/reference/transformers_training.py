"""Trains the compared cases with Hugging Face transformers and peft, in float32 on CPU.

    python -m tests.reference.transformers_training      # rewrites golden_curves.json

Nothing of this project's training is used: the loop, the loss, the schedule and the optimizer are
PyTorch's and written out here. Shared are only the starting weights, the token ids of the samples
and the order of the samples.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from tests.families.cases import FACTS
from tests.reference.curves import (
    CASES,
    COMMON,
    GOLDEN,
    HERE,
    LORA_RANK,
    NUM_STEPS,
    Case,
    build_adapter,
    build_model,
)
from tests.reference.llama_changes import add_distances, join_inputs, norm_head
from tests.reference.transformers_logits import model_class

IGNORED = -100


@dataclass(frozen=True)
class Reference:
    """How a family is called in transformers.

    Attributes:
        transformers_class: "Llama" in LlamaForCausalLM.
        fields: Fields of the config, as (transformers' name, the tiny checkpoint's name).
        renamed: (pattern, replacement) that turn the tiny checkpoint's weight names into transformers'.
        lora_layers: Last parts of the names of the layers that LoRA adapts.
        config_class: Of transformers, where it has another prefix.
        turned: Whether linear weights are the transposes of the tiny checkpoint's.
        change: Gives the model layers that transformers' has not.
        attention: transformers' implementation; other plain ones leave caps of scores out.
    """

    transformers_class: str
    fields: tuple[tuple[str, str], ...]
    renamed: tuple[tuple[str, str], ...]
    lora_layers: tuple[str, ...]
    config_class: str = ""
    change: Callable[[Any], None] = lambda model: None
    turned: bool = True
    attention: str = "eager"

    def rename(self, name: str) -> str:
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name


def _same(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, name) for name in names)


_SIZES = _same(
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
)  # fmt: skip


_DECODER = (r"^\w+\.(?=(embed_tokens|layers|norm)\.)", "model.")


def _joined(*changes: Callable[[Any], None], grouped: bool = False) -> Reference:
    """A Llama whose queries, keys and values come from one layer, and with further changes."""

    def change(model: Any) -> None:
        join_inputs(model, grouped=grouped)
        for each in changes:
            each(model)

    return Reference(
        "Llama",
        _SIZES,
        (_DECODER, ("query_key_value_proj", "qkv")),
        ("qkv", "o_proj", "gate_proj", "up_proj", "down_proj"),
        change=change,
    )


def _rotary(name: str, *extra: str) -> Reference:
    fields = (*_SIZES, *_same(*extra))
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Reference(name, fields, (_DECODER,), layers)


def _gemma(name: str, transformers_class: str, *extra: str) -> Reference:
    names = ("head_dim", "hidden_activation", "query_pre_attn_scalar", "sliding_window", *extra)
    return replace(_rotary(transformers_class, *names), renamed=((rf"^{name}\.", "model."),))


REFERENCES = {
    **{
        name: _rotary(facts.named_as_llama, *facts.llama_fields)
        for name, facts in FACTS.items()
        if facts.named_as_llama
    },
    "mixtral": Reference(
        "Mixtral",
        (*_SIZES, *_same("sliding_window", "num_local_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")),
        (
            (r"^mixtral\.", "model."), (r"\.mlp\.", ".block_sparse_moe."),
            ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"),
        ),
        ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"),
    ),
    "internlm": replace(_rotary("Llama"), fields=(*_SIZES, ("attention_bias", "bias"))),
    "internlm2": _joined(grouped=True),
    "baichuan": _joined(),
    "baichuan2": _joined(norm_head, add_distances),
    "glm4": Reference(
        "Glm4",
        (*_SIZES, *_same("head_dim", "pad_token_id", "attention_bias", "partial_rotary_factor")),
        ((r"^glm4\.", "model."),),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "gemma2": _gemma("gemma2", "Gemma2", "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3": replace(
        _gemma("gemma3", "Gemma3", "rope_local_base_freq", "layer_types"), config_class="Gemma3TextConfig"
    ),
    "phi3": Reference(
        "Phi3",
        (*_SIZES, ("pad_token_id", "pad_token_id")),
        ((r"^phi3\.", "model."), ("query_key_value_proj", "qkv_proj")),
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "bloom": Reference(
        "Bloom",
        _same("vocab_size", "hidden_size", "n_layer", "n_head", "layer_norm_epsilon", "hidden_dropout",
              "attention_dropout"),
        ((r"^bloom\.", "transformer."),),
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "falcon": Reference(
        "Falcon",
        (
            *_same("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
                   "rope_theta", "new_decoder_architecture", "parallel_attn", "alibi", "bias"),
            # Only the tiny model with a form of its own has heads of keys for all queries, one branch behind the other.
            ("multi_query", "parallel_attn"),
            ("ffn_hidden_size", "intermediate_size"), ("num_kv_heads", "num_key_value_heads"),
        ),
        (
            (r"^falcon\.", "transformer."), ("embed_tokens", "word_embeddings"), (r"layers\.", "h."),
            (r"transformer\.norm", "transformer.ln_f"), ("self_attn.query_key_value_proj", "self_attention.query_key_value"),
            ("self_attn.o_proj", "self_attention.dense"), ("up_proj", "dense_h_to_4h"), ("down_proj", "dense_4h_to_h"),
        ),
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        attention="sdpa",  # the plain one adds distances twice
    ),
    "gpt2": Reference(
        "GPT2",
        (
            ("vocab_size", "vocab_size"), ("n_embd", "hidden_size"), ("n_inner", "intermediate_size"),
            ("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads"),
            ("n_positions", "max_position_embeddings"), ("layer_norm_epsilon", "rms_norm_eps"),
            ("attn_pdrop", "attention_dropout"), ("resid_pdrop", "branch_dropout"), ("embd_pdrop", "embedding_dropout"),
        ),
        (
            (r"^gpt2\.", "transformer."), ("embed_tokens", "wte"), ("embed_positions", "wpe"), (r"layers\.", "h."),
            (r"transformer\.norm", "transformer.ln_f"), ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"),
            ("self_attn.query_key_value_proj", "attn.c_attn"), ("self_attn.o_proj", "attn.c_proj"),
            ("up_proj", "c_fc"), ("down_proj", "c_proj"),
        ),
        ("c_attn", "c_proj", "c_fc"),
        turned=False,
    ),
    "opt": Reference(
        "OPT",
        (
            *_same("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                   "max_position_embeddings", "word_embed_proj_dim"),
            ("ffn_dim", "intermediate_size"), ("dropout", "hidden_dropout_prob"),
            ("attention_dropout", "attention_probs_dropout_prob"), ("activation_function", "hidden_act"),
        ),
        (
            (r"^opt\.embeddings\.word_embeddings", "model.decoder.embed_tokens"),
            (r"^opt\.embeddings\.position_embeddings", "model.decoder.embed_positions"),
            (r"^opt\.", "model."), (r"linear([12])", r"fc\1"),
            (r"norm1", "self_attn_layer_norm"), (r"norm2", "final_layer_norm"),
        ),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ),
}  # fmt: skip


def load_reference_model(folder: Path, family: str = "llama") -> Any:
    """The tiny checkpoint in transformers: same numbers, linear weights transposed to [out, in]."""
    reference = REFERENCES[family]
    config = json.loads((folder / "config.json").read_text())
    settings = {theirs: config[ours] for theirs, ours in reference.fields}
    config_class = getattr(transformers, reference.config_class or f"{reference.transformers_class}Config")
    model = model_class(reference.transformers_class)(
        config_class(**settings, attn_implementation=reference.attention)
    )
    reference.change(model)
    state = {}
    for name, array in load_file(folder / "model.safetensors").items():
        is_linear = array.ndim == 2 and "embed" not in name and reference.turned
        state[reference.rename(name)] = torch.from_numpy(array.T.copy() if is_linear else array)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    assert "lm_head.weight" in state or model.config.tie_word_embeddings
    model.tie_weights()
    return model.float()


def add_reference_lora(model: Any, adapter: Path, *, family: str = "llama", rslora: bool = False) -> Any:
    """The same LoRA matrices in peft, transposed to its layout."""
    from peft import LoraConfig, get_peft_model

    reference = REFERENCES[family]
    targets = list(reference.lora_layers)
    adapted = get_peft_model(
        model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets, use_rslora=rslora)
    )
    saved = load_file(adapter / "weights.safetensors")
    parameters = dict(adapted.named_parameters())
    for name, array in saved.items():
        layer, _, part = f"base_model.model.{reference.rename(name)}".rpartition(".")
        parameters[f"{layer}.{part}.default.weight"].data = torch.from_numpy(array.T.copy())
    assert len(saved) == sum(parameter.requires_grad for parameter in parameters.values())
    return adapted


def freeze_reference(model: Any, case: Case) -> None:
    """Takes the gradients of what a case freezes away."""
    parameters = dict(model.named_parameters())
    left = int(sum(each.numel() for each in parameters.values()) * case.frozen_share)
    for name, each in parameters.items():
        left -= each.numel()
        if left >= 0 or (case.frozen and re.match(case.frozen, name)):
            each.requires_grad_(False)


def learning_rate_factor(step: int, arguments: dict[str, Any]) -> float:
    """Linear warm-up, then linear or cosine decay to zero; `step` counts finished steps."""
    warmup = arguments["warmup_steps"]
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / (NUM_STEPS - warmup)
    if arguments.get("lr_scheduler_type") == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress


def decay_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """No weight decay on biases and norms, which are vectors."""
    groups: dict[bool, list] = {True: [], False: []}
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1].append(parameter)
    return [{"params": part, "weight_decay": weight_decay if on else 0.0} for on, part in groups.items()]


def train_reference(model: Any, samples: list, arguments: dict[str, Any]) -> list[dict[str, float]]:
    """Loss, gradient norm and learning rate of every step."""
    model.train()
    groups = decay_groups(model, arguments["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=arguments["learning_rate"], betas=(0.9, 0.999), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, arguments)
    )
    curve = []
    for batch in batches(samples, arguments):
        loss = label_loss(model, batch, arguments.get("router_aux_loss_coef", 0.0))
        loss.backward()
        trained = [p for group in groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, arguments["max_grad_norm"])
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate})
    return curve


def batches(samples: list, arguments: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """The global batch of every step: input_ids, attention_mask and labels, int64 [batch, length]."""
    batch_size = arguments["per_device_train_batch_size"] * arguments.get("gradient_accumulation_steps", 1)
    for step in range(NUM_STEPS):
        batch = [samples[i] for i in sample_order(len(samples), step, batch_size, arguments["seed"])]
        yield join_samples(batch)


def join_samples(batch: list) -> dict[str, torch.Tensor]:
    """Padded rows of samples: input_ids, attention_mask and labels, int64 [batch, length]."""
    length = max(len(sample.input_ids) for sample in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORED)
    mask = torch.zeros(len(batch), length, dtype=torch.long)
    for row, sample in enumerate(batch):
        size = len(sample.input_ids)
        ids[row, :size] = torch.from_numpy(sample.input_ids.astype(np.int64))
        labels[row, :size] = torch.from_numpy(sample.labels.astype(np.int64))
        mask[row, :size] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def label_loss(model: Any, batch: dict[str, torch.Tensor], balance: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy over label tokens, in float32, and with experts the loss that spreads tokens over them."""
    asked = {"output_router_logits": True} if balance else {}
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **asked)
    tokens = torch.nn.functional.cross_entropy(
        outputs.logits.float().flatten(0, 1),
        batch["labels"].flatten(),
        ignore_index=IGNORED,
        reduction="mean",
    )
    return tokens + balance * outputs.aux_loss if balance else tokens


def sample_order(num_samples: int, step: int, batch_size: int, seed: int) -> np.ndarray:
    """The published order of samples: a PCG64 permutation per (seed, epoch), cut into batches."""
    steps_per_epoch = -(-num_samples // batch_size)
    epoch, place = divmod(step, steps_per_epoch)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(num_samples)[place * batch_size : (place + 1) * batch_size]


def read_samples(model_folder: Path, family: str = "llama") -> list:
    """The samples as token ids, read by this project."""
    from finetune.data.samples.dataset import load_samples
    from finetune.data.templates.template import load_template
    from finetune.families.family import get_family
    from finetune.tokenizers.encoder import FamilyEncoder
    from finetune.tokenizers.loading import load_tokenizer

    encoder = FamilyEncoder(load_tokenizer(model_folder), get_family(family))
    lengths = {name: COMMON[name] for name in ("src_length", "max_length")}
    return load_samples([HERE / "data" / "train.json"], encoder, load_template(None), **lengths)[0]


def reference_curve(name: str) -> list[dict[str, float]]:
    """The curve of a case."""
    torch.manual_seed(0)
    case = CASES[name]
    with tempfile.TemporaryDirectory() as place:
        folder = build_model(Path(place) / case.family, case.family, case.shape)
        samples = read_samples(folder, case.family)
        model = load_reference_model(folder, case.family)
        if case.lora:
            rslora = bool(case.arguments.get("rslora"))
            adapter = build_adapter(Path(place) / case.name, folder, family=case.family, rslora=rslora)
            model = add_reference_lora(model, adapter, family=case.family, rslora=rslora)
        freeze_reference(model, case)
        return train_reference(model, samples, COMMON | case.arguments)


def reference_curves() -> dict[str, list[dict[str, float]]]:
    """The curves of all cases."""
    return {name: reference_curve(name) for name in CASES}


def main() -> int:
    """Writes the golden values that are compared with where PyTorch is not installed."""
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    GOLDEN.write_text(json.dumps({"made_with": made_with, "curves": reference_curves()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
