"""XVERSE 7B, 13B and 65B: Llama's architecture with a tokenizer.json of its own."""

from __future__ import annotations

from typing import Any

from finetune.families.chat_format import ChatFormat
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import (
    LINEAR_LAYERS,
    TENSOR_SPLITS,
    gated_decoder_config,
    gated_decoder_weights,
    require_values,
)
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import check_head_dim, without_scaling
from finetune.families.text_patterns import GPT2_PATTERN
from finetune.families.tiny_recipe import ByteLevelKind, TensorSpec, TinyRecipe, TinyShape


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Refuses what the layers do not compute."""
    require_values(config, "XVERSE", hidden_act="silu")
    check_head_dim(config)
    return without_scaling(config)


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return gated_decoder_config(shape, model_type="xverse", architectures=["XverseForCausalLM"])


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return gated_decoder_weights(shape, "xverse")


XVERSE = register(
    Family(
        name="xverse",
        models="XVERSE 7B, 13B, 65B",
        model_types=("xverse",),
        architectures=("XverseForCausalLM",),
        model_class="finetune.families.xverse.layers.XverseForCausalLM",
        base_prefix="xverse",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            end_of_answer="eos",
            pad_fallback="eos",
            vocab_files=("tokenizer.json",),
            tokenizer_class="finetune.families.json_tokenizer.JsonTokenizer",
            own_class=True,
            opened_by_file=True,
        ),
        chat_template="xverse",
        hugging_face=HuggingFaceForm(
            needs_files="configuration_xverse.py and modeling_xverse.py of the published XVERSE"
        ),
        chat_formats={"xverse": ChatFormat(system="{content}\n\n", user="Human: {content}\n\nAssistant: ")},
        tiny=TinyRecipe(
            tokenizer=ByteLevelKind(
                special_tokens=("<unk>", "<pad>", "<|startoftext|>", "<|endoftext|>"),
                roles={"unk": "<unk>", "pad": "<pad>", "bos": "<|startoftext|>", "eos": "<|endoftext|>"},
                pattern=GPT2_PATTERN,
                special_first=True,
                one_file=True,
                settings={"tokenizer_class": "PreTrainedTokenizerFast"},
            ),
            config=_tiny_config,
            weights=_tiny_weights,
        ),
        fields=ConfigFields(num_kv_heads="num_key_value_heads"),
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        argument_folder="llama",
        adapt_config=_adapt_config,
        understood=("head_dim", "max_tokenizer_truncation", "rope_parameters", "rope_scaling"),
        tensor_splits=TENSOR_SPLITS,
    )
)
