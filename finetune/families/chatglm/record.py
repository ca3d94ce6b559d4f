"""ChatGLM-6B, the first generation: prompts read in both directions, two positions of each token."""

from __future__ import annotations

from typing import Any

from finetune.families.chat_format import ChatFormat
from finetune.families.chatglm.config import UNDERSTOOD, adapt_config, covers, published_config
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import TENSOR_SPLITS
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.tiny_recipe import TensorSpec, TinyRecipe, TinyShape


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": ["ChatGLMForCausalLM"],
        "model_type": "chatglm",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "max_position_embeddings": shape.max_length,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "position_encoding_2d": True,
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    weights = {"chatglm.embed_tokens.weight": TensorSpec((shape.vocab_size, hidden))}
    for number in range(shape.num_layers):
        layer = f"chatglm.layers.{number}."
        weights |= _norm(f"{layer}input_layernorm", hidden)
        weights |= _linear(f"{layer}self_attn.query_key_value_proj", hidden, 3 * hidden)
        weights |= _linear(f"{layer}self_attn.o_proj", hidden, hidden)
        weights |= _norm(f"{layer}post_attention_layernorm", hidden)
        weights |= _linear(f"{layer}mlp.up_proj", hidden, inner)
        weights |= _linear(f"{layer}mlp.down_proj", inner, hidden)
    return weights | _norm("chatglm.norm", hidden)


def _linear(name: str, inputs: int, outputs: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec((inputs, outputs)), f"{name}.bias": TensorSpec((outputs,), "zeros")}


def _norm(name: str, size: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec((size,), "ones"), f"{name}.bias": TensorSpec((size,), "zeros")}


CHATGLM = register(
    Family(
        name="chatglm",
        models="ChatGLM-6B",
        model_types=("chatglm",),
        architectures=("ChatGLMForCausalLM", "ChatGLMForConditionalGeneration", "ChatGLMModel"),
        model_class="finetune.families.chatglm.layers.ChatGLMForCausalLM",
        base_prefix="chatglm",
        lora_target_modules=(".*query_key_value_proj.*", ".*o_proj.*", ".*up_proj.*", ".*down_proj.*"),
        embedding_module="embed_tokens",
        # What a token sees of its own text is no longer what lies before it.
        sees_ahead=True,
        fused_packing="block",
        # Past keys and values: (batch, length, heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            answer_prefix=("[gMASK]", "<sop>"),
            end_of_answer="<eop>",
            pad_fallback="<pad>",
            vocab_files=("ice_text.model",),
            tokenizer_class="finetune.families.chatglm.tokenizer.ChatGLMTokenizer",
            own_class=True,
        ),
        chat_template="chatglm",
        hugging_face=HuggingFaceForm(
            prefix="transformer",
            pairs=(
                ("word_embeddings", "embed_tokens"),
                ("layers.{}.attention.query_key_value", "layers.{}.self_attn.query_key_value_proj"),
                ("layers.{}.attention.dense", "layers.{}.self_attn.o_proj"),
                ("layers.{}.mlp.dense_h_to_4h", "layers.{}.mlp.up_proj"),
                ("layers.{}.mlp.dense_4h_to_h", "layers.{}.mlp.down_proj"),
                ("final_layernorm", "norm"),
            ),
            always_tied=True,
            config=published_config,
            needs_files="configuration_chatglm.py and modeling_chatglm.py of THUDM/chatglm-6b",
        ),
        memory=LayerMemory(hidden=4, inner=2, norms=0),
        chat_formats={
            "chatglm": ChatFormat(  # what stands before an answer, "[gMASK]<sop>", is put there by the family
                system="{content}\n",
                user="[Round {round}]\n问：{content}\n答：",
                only_user="{content}",
                first_round=0,
                after="\n",
            )
        },
        tiny=TinyRecipe(
            tokenizer="sentencepiece_chatglm",
            config=_tiny_config,
            weights=_tiny_weights,
            grouped_heads=False,
            head_dim_multiple=4,
        ),
        fields=ConfigFields(),
        positions_end=False,
        parallel=ParallelLimits(tensor_divides=("num_attention_heads", "intermediate_size")),
        sequence_parallel=True,
        argument_folder="chatglm2",
        # Worked out anew in every pass.
        computed_weights=(r"rotary_emb\.inv_freq$",),
        adapt_config=adapt_config,
        covers=covers,
        told_by="inner_hidden_size in place of ffn_hidden_size",
        understood=UNDERSTOOD,
        # Query, key and value of one head after the other.
        tensor_splits=TENSOR_SPLITS | {"query_key_value_proj": "columns"},
    )
)
