"""The checkpoints whose logits are compared with Hugging Face transformers.

A checkpoint is a config as transformers writes it and weights that NumPy draws from a seed, under
transformers' names and in its layout. So the comparison with golden logits needs no PyTorch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from finetune.families.registry import get_family
from tests.families.cases import FACTS
from tests.families.family_facts import FamilyFacts
from tests.reference import published_forms
from tests.reference.published_forms import PublishedForm

HERE = Path(__file__).resolve().parent
GOLDEN_LOGITS = HERE / "golden_logits.npz"
GOLDEN_CHECKPOINTS = HERE / "golden_logits.json"
LENGTHS = (12, 7)
"""Tokens of the two compared rows; the shorter one is padded on the right."""

LARGE, REALISTIC = 0.2, 0.02
"""Spread of the weights: logits of order one, and that of freshly initialised models."""

VOCAB_SIZE = 64
_SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
_ROTARY = _SIZES | {
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 50000.0,
}
_WHOLE_HEADS = _ROTARY | {"num_key_value_heads": 4, "rope_theta": 10000.0}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0),
}
_FALCON = _SIZES | {"rope_theta": 50000.0, "max_position_embeddings": 64}
_SIX_HEADS = {"hidden_size": 48, "num_attention_heads": 6}
# Its plain form ("eager") adds distances twice: once in the mask, once to the scores.
_ONCE = "sdpa"
_ALIBI = {"alibi": True, "tie_word_embeddings": False}
_RW_FALCON = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
_NEW_FALCON = _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LINEAR = {"rope_type": "linear", "factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_YARN_MSCALE = _YARN | {
    "beta_fast": 8.0,
    "beta_slow": 0.5,
    "mscale": 0.7,
    "mscale_all_dim": 0.3,
    "truncate": False,
}
_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 6.0]}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
_NAMED_WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "layer_types": _LAYERS}
_GEMMA2 = _ROTARY | {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "sliding_window": 4,
    "layer_types": _LAYERS,
}
_GEMMA3 = _ROTARY | {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 4,
    "layer_types": _LAYERS,
    "rope_local_base_freq": 100.0,
}
_FACTORS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.6,
    "logits_scaling": 1.5,
}
_BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "pad_token_id": 0}
_GLM = _ROTARY | {"head_dim": 16, "pad_token_id": 0, "rms_norm_eps": 1e-5}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_OPT = _SIZES | {"ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0, "word_embed_proj_dim": 32}


@dataclass(frozen=True)
class LogitCase:
    """One checkpoint.

    Attributes:
        name: How the tests call it.
        transformers_class: Prefix of transformers' class names ("Llama" in LlamaForCausalLM).
        config: Arguments of its config.
        norm_mean: Mean of the norm weights. Gemma stores them as differences from one.
        config_class: Of transformers, where it has another prefix.
        changes: Functions of `llama_changes` that change transformers' model.
        form: How a published folder holds it, where transformers has no code of the family.
        attention: transformers' implementation that is compared with.
    """

    name: str
    transformers_class: str
    config: dict[str, Any] = field(default_factory=dict)
    norm_mean: float = 1.0
    config_class: str = ""
    form: PublishedForm = field(default_factory=PublishedForm)
    changes: tuple[str, ...] = ()
    attention: str = "eager"

    def write(
        self, folder: Path, config: dict[str, Any], shapes: dict[str, list[int]], scale: float = LARGE
    ) -> Path:
        """A folder of the published form, its weights drawn.

        Args:
            folder: To create.
            config: config.json of transformers' model.
            shapes: Of its weights.
            scale: See `draw_weights`.
        """
        weights = self.form.rearrange(draw_weights(self, shapes, scale), config)
        return write_checkpoint(folder, self.form.config_of(config), weights)


CASES = {
    case.name: case
    for case in (
        LogitCase("llama", "Llama", _ROTARY),
        LogitCase("llama3", "Llama", _ROTARY | {"rope_scaling": _LLAMA3}),
        LogitCase("llama_biases", "Llama", _ROTARY | {"attention_bias": True, "mlp_bias": True}),
        LogitCase("llama_wide_heads", "Llama", _ROTARY | {"head_dim": 16}),
        LogitCase(
            "internlm",
            "Llama",
            _ROTARY | {"num_key_value_heads": 4, "attention_bias": True},
            form=published_forms.INTERNLM,
        ),
        LogitCase("internlm2", "Llama", _ROTARY, form=published_forms.INTERNLM2),
        LogitCase("baichuan", "Llama", _WHOLE_HEADS, form=published_forms.BAICHUAN),
        LogitCase(
            "baichuan_13b",
            "Llama",
            _WHOLE_HEADS | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6},
            form=published_forms.BAICHUAN_13B,
            changes=("add_distances",),
        ),
        LogitCase(
            "baichuan2", "Llama", _WHOLE_HEADS, form=published_forms.BAICHUAN2, changes=("norm_head",)
        ),
        LogitCase(
            "baichuan2_13b",
            "Llama",
            _WHOLE_HEADS,
            form=published_forms.BAICHUAN2_13B,
            changes=("norm_head", "add_distances"),
        ),
        LogitCase("qwen2", "Qwen2", _ROTARY),
        LogitCase("qwen2_tied", "Qwen2", _ROTARY | {"tie_word_embeddings": True}),
        LogitCase("ernie4_5", "Ernie4_5", _ROTARY | {"head_dim": 16}),
        LogitCase("glm", "Glm", _GLM),
        LogitCase("glm4", "Glm4", _GLM),
        LogitCase("phi3", "Phi3", _ROTARY | {"pad_token_id": 0, "sliding_window": 4}),
        LogitCase("qwen3", "Qwen3", _ROTARY | {"head_dim": 16}),
        LogitCase("qwen3_tied", "Qwen3", _ROTARY | {"head_dim": 16, "tie_word_embeddings": True}),
        LogitCase("qwen2_windows", "Qwen2", _ROTARY | _WINDOWS),
        LogitCase("qwen3_windows", "Qwen3", _ROTARY | _NAMED_WINDOWS | {"head_dim": 16}),
        LogitCase("qwen2_moe", "Qwen2Moe", _ROTARY | _EXPERTS | {"shared_expert_intermediate_size": 40}),
        LogitCase(
            "qwen2_moe_dense_layers",
            "Qwen2Moe",
            _ROTARY | _EXPERTS | {"norm_topk_prob": True, "qkv_bias": False, "decoder_sparse_step": 2},
        ),
        LogitCase("qwen3_moe", "Qwen3Moe", _ROTARY | _EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
        LogitCase(
            "qwen3_moe_dense_layers", "Qwen3Moe", _ROTARY | _EXPERTS | {"head_dim": 16, "mlp_only_layers": [1]}
        ),
        LogitCase("mixtral", "Mixtral", _ROTARY | {"num_local_experts": 5, "sliding_window": None}),
        LogitCase("mixtral_window", "Mixtral", _ROTARY | {"num_local_experts": 3, "sliding_window": 4}),
        LogitCase("qwen2_moe_window", "Qwen2Moe", _ROTARY | _EXPERTS | _WINDOWS | {"max_window_layers": 0}),
        LogitCase("qwen3_moe_window", "Qwen3Moe", _ROTARY | _EXPERTS | {"use_sliding_window": True, "sliding_window": 4, "head_dim": 16}),
        LogitCase("mixtral_yarn", "Mixtral", _ROTARY | {"head_dim": 8, "num_local_experts": 3, "rope_scaling": _YARN}),
        LogitCase("mixtral_llama3", "Mixtral", _ROTARY | {"head_dim": 8, "num_local_experts": 3, "rope_scaling": _LLAMA3}),
        LogitCase("bloom", "Bloom", {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
        LogitCase("bloom_6_heads", "Bloom", {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
        LogitCase("opt", "OPT", _OPT),
        LogitCase("opt_350m", "OPT", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        LogitCase("gpt2", "GPT2", _GPT2),
        LogitCase("gpt2_inner", "GPT2", _GPT2 | {"n_inner": 48, "activation_function": "gelu_fast"}),
        LogitCase("falcon_7b", "Falcon", _FALCON),
        LogitCase("falcon_40b", "Falcon", _NEW_FALCON),
        LogitCase("falcon_11b", "Falcon", _NEW_FALCON | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False}),
        LogitCase("falcon_sequential", "Falcon", _FALCON | {"multi_query": False, "parallel_attn": False, "bias": True}),
        LogitCase("falcon_rw", "Falcon", _SIZES | _SIX_HEADS | _RW_FALCON, attention=_ONCE),
        LogitCase("falcon_rw_parallel", "Falcon", _SIZES | _SIX_HEADS | _ALIBI, attention=_ONCE),
        LogitCase("falcon_yarn", "Falcon", _NEW_FALCON | {"rope_scaling": _YARN}),
        LogitCase("granite", "Granite", _ROTARY | _FACTORS),
        LogitCase("granite_biases_yarn", "Granite", _ROTARY | _FACTORS | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_scaling": _YARN}),
        LogitCase("smollm3", "SmolLM3", _ROTARY | {"no_rope_layer_interval": 2, "pad_token_id": 0}),
        LogitCase("smollm3_biases_yarn", "SmolLM3", _ROTARY | _BIASED | {"no_rope_layers": [0, 1, 1], "rope_scaling": _YARN}),
        LogitCase("mistral", "Mistral", _ROTARY | {"sliding_window": None}),
        LogitCase("mistral_window", "Mistral", _ROTARY | {"sliding_window": 4}),
        LogitCase("mistral_nemo", "Mistral", _ROTARY | {"sliding_window": None, "head_dim": 16}),
        LogitCase("gemma2", "Gemma2", _GEMMA2, norm_mean=0.0),
        LogitCase("gemma2_no_window", "Gemma2", _GEMMA2 | {"sliding_window": 64}, norm_mean=0.0),
        LogitCase("gemma3", "Gemma3", _GEMMA3, norm_mean=0.0, config_class="Gemma3TextConfig"),
        LogitCase("gemma3_linear", "Gemma3", _GEMMA3 | {"rope_scaling": _LINEAR}, norm_mean=0.0, config_class="Gemma3TextConfig"),
        LogitCase("phi3_longrope", "Phi3", _ROTARY | {"pad_token_id": 0, "sliding_window": None, "rope_scaling": _LONGROPE, "original_max_position_embeddings": 16, "partial_rotary_factor": 0.5}),
        LogitCase("llama_yarn", "Llama", _ROTARY | {"rope_scaling": _YARN}),
        LogitCase("llama_yarn_mscale", "Llama", _ROTARY | {"rope_scaling": _YARN_MSCALE}),
        LogitCase("llama_biases_llama3", "Llama", _ROTARY | {"attention_bias": True, "rope_scaling": _LLAMA3}),
        LogitCase("llama_dynamic", "Llama", _ROTARY | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        LogitCase("qwen2_yarn", "Qwen2", _ROTARY | {"rope_scaling": _YARN}),
        LogitCase("glm4_linear", "Glm4", _GLM | {"rope_scaling": _LINEAR}),
        LogitCase("qwen3_yarn", "Qwen3", _ROTARY | {"head_dim": 16, "rope_scaling": _YARN}),
        LogitCase("gemma", "Gemma", _ROTARY | {"head_dim": 16}, norm_mean=0.0),
        LogitCase("gemma_mqa", "Gemma", _ROTARY | {"head_dim": 16, "num_key_value_heads": 1}, norm_mean=0.0),
    )
}  # fmt: skip


def _named_as_llama(name: str, facts: FamilyFacts) -> LogitCase:
    """The plain case of a family that needs no more than the row in `tests.families.cases`."""
    family = get_family(name)
    heads = {} if facts.groups_heads else {"num_key_value_heads": _SIZES["num_attention_heads"]}
    names = {"model_type": family.model_types[0], "architectures": list(family.architectures)}
    form = PublishedForm(names if facts.named_as_llama == "Llama" else {})
    return LogitCase(name, facts.named_as_llama, _ROTARY | heads, form=form)


CASES |= {
    name: _named_as_llama(name, facts)
    for name, facts in FACTS.items()
    if facts.named_as_llama and name not in CASES
}


def input_rows() -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, [2, 12] int64."""
    ids = np.random.default_rng(7).integers(3, VOCAB_SIZE, (len(LENGTHS), max(LENGTHS)))
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    return ids * mask, mask


def draw_weights(case: LogitCase, shapes: dict[str, list[int]], scale: float) -> dict[str, np.ndarray]:
    """Float32 weights by transformers' names: matrices of the given spread, norms around the case's mean."""
    random = np.random.Generator(np.random.PCG64(5))
    weights = {}
    for name, shape in sorted(shapes.items()):
        noise = random.standard_normal(shape, dtype=np.float32)
        if name.endswith("bias"):
            weights[name] = noise * np.float32(0.1)
        elif len(shape) == 1:
            weights[name] = noise * np.float32(0.1) + np.float32(case.norm_mean)
        else:
            weights[name] = noise * np.float32(scale)
    return weights


def write_checkpoint(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    """A folder as transformers' `save_pretrained` leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """The config with its rotary settings where transformers 5 writes them."""
    moved = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    return moved | {"rope_parameters": {"rope_theta": config["rope_theta"], **scaling}}


def our_logits(folder: Path) -> np.ndarray:
    """[2, 12, vocabulary] of this project's model, without a mask, as the trainer calls it."""
    import paddle

    from finetune.models.loading import load_model
    from finetune.models.resolve import resolve_model
    from finetune.training.loss import logits_of

    model = load_model(resolve_model(folder), dtype="float32")
    with paddle.no_grad():
        return logits_of(model(input_ids=paddle.to_tensor(input_rows()[0]))).numpy()


def largest_difference(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference of a logit, on tokens that are no padding."""
    real = input_rows()[1].astype(bool)
    return float(np.abs(ours[real] - reference[real]).max())
