"""GPT-2, and what has its shape: PolyLM."""

from __future__ import annotations

from typing import Any

from finetune.errors import UserError
from finetune.families.chat_format import ChatFormat
from finetune.families.config_checks import check_names_agree, check_norm_epsilon
from finetune.families.family import Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import TENSOR_SPLITS, require_values
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.text_patterns import GPT2_PATTERN
from finetune.families.tiny_recipe import ByteLevelKind, TensorSpec, TinyRecipe, TinyShape

# Hugging Face's field -> its name here.
_FIELDS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "rms_norm_eps",
    "attn_pdrop": "attention_dropout",
    "resid_pdrop": "branch_dropout",
    "embd_pdrop": "embedding_dropout",
}
# What transformers takes for fields that a config.json leaves out; dropout is left to it.
_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 1024, "tie_word_embeddings": True}
_DROPOUT = dict.fromkeys(("attention_dropout", "branch_dropout", "embedding_dropout"), 0.1)
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
# What PaddleNLP's object writes beside them, of the models that its class was made for.
_OF_THE_CLASS = ("hidden_act", "num_key_value_heads", "rope_theta", "head_dim")
_ACTIVATIONS = (None, "gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # three names of one function


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's field names -> those of the layers; refuses what they do not compute."""
    require_values(config, "GPT-2", **_FIXED)
    check_norm_epsilon(config, "layer_norm_epsilon")
    check_names_agree(config, _FIELDS)
    if config.get("activation_function") not in _ACTIVATIONS:
        raise UserError(
            f"config.json has activation_function {config['activation_function']!r}; allowed for GPT-2: "
            f"{', '.join(filter(None, _ACTIVATIONS))}. Use other weights"
        )
    adapted = {name: value for name, value in config.items() if name not in (*_FIELDS, "n_ctx")}
    for theirs, ours in _FIELDS.items():
        if config.get(theirs) is not None:
            adapted[ours] = config[theirs]
    if "intermediate_size" not in adapted and "hidden_size" in adapted:
        adapted["intermediate_size"] = 4 * adapted["hidden_size"]
    return {**_DEFAULTS, **_DROPOUT, **adapted}


def _to_hugging_face(config: dict[str, Any]) -> dict[str, Any]:
    theirs = {here: there for there, here in _FIELDS.items()}
    published = {theirs.get(name, name): value for name, value in config.items()}
    return {**published, "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"]}


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": ["Gpt2ForCausalLM"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "max_position_embeddings": shape.max_length,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "branch_dropout": 0.0,
        "embedding_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    weights = {
        "gpt2.embed_tokens.weight": TensorSpec((shape.vocab_size, hidden)),
        "gpt2.embed_positions.weight": TensorSpec((shape.max_length, hidden)),
    }
    for number in range(shape.num_layers):
        layer = f"gpt2.layers.{number}."
        weights |= _linear(f"{layer}self_attn.query_key_value_proj", hidden, 3 * hidden)
        weights |= _linear(f"{layer}self_attn.o_proj", hidden, hidden)
        weights |= _linear(f"{layer}mlp.up_proj", hidden, inner)
        weights |= _linear(f"{layer}mlp.down_proj", inner, hidden)
        weights |= _norm(f"{layer}input_layernorm", hidden) | _norm(
            f"{layer}post_attention_layernorm", hidden
        )
    return weights | _norm("gpt2.norm", hidden)


def _linear(name: str, inputs: int, outputs: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec((inputs, outputs)), f"{name}.bias": TensorSpec((outputs,), "zeros")}


def _norm(name: str, size: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec((size,), "ones"), f"{name}.bias": TensorSpec((size,), "zeros")}


GPT2 = register(
    Family(
        name="gpt2",
        models="GPT-2, PolyLM",
        model_types=("gpt2",),
        architectures=("Gpt2ForCausalLM", "GPT2LMHeadModel"),
        model_class="finetune.families.gpt2.layers.Gpt2ForCausalLM",
        base_prefix="gpt2",
        lora_target_modules=(".*query_key_value_proj.*", ".*o_proj.*", ".*up_proj.*", ".*down_proj.*"),
        embedding_module="embed_tokens",
        entry_modules=("embed_tokens", "embed_positions"),
        fused_packing="rows",
        # Past keys and values: (batch, length, heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            end_of_answer="eos",
            pad_fallback="eos",
            vocab_files=("vocab.json", "tokenizer.model"),
            tokenizer_class="paddlenlp.transformers.GPTTokenizer",
        ),
        # Buffers of the first files: the causal mask.
        computed_weights=(r"\.attn\.(masked_)?bias$",),
        hugging_face=HuggingFaceForm(
            prefix="transformer",
            bare=True,
            turned=False,
            pairs=(
                ("wte", "embed_tokens"),
                ("wpe", "embed_positions"),
                ("h.{}.ln_1", "layers.{}.input_layernorm"),
                ("h.{}.attn.c_attn", "layers.{}.self_attn.query_key_value_proj"),
                ("h.{}.attn.c_proj", "layers.{}.self_attn.o_proj"),
                ("h.{}.ln_2", "layers.{}.post_attention_layernorm"),
                ("h.{}.mlp.c_fc", "layers.{}.mlp.up_proj"),
                ("h.{}.mlp.c_proj", "layers.{}.mlp.down_proj"),
                ("ln_f", "norm"),
            ),
            tables=("embed_tokens", "embed_positions"),
            always_tied=True,
            config=_to_hugging_face,
        ),
        memory=LayerMemory(hidden=4, inner=2, norms=0),
        chat_formats={
            "polylm": ChatFormat(
                system="{content}\n", user="<|user|>\n{content}\n<|assistant|>\n", after="\n"
            )
        },
        tiny=TinyRecipe(
            tokenizer=ByteLevelKind(
                special_tokens=("<|endoftext|>",),
                roles=dict.fromkeys(("bos", "eos", "pad", "unk"), "<|endoftext|>"),
                pattern=GPT2_PATTERN,
                special_first=False,
                one_file=False,
                settings={"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False},
            ),
            config=_tiny_config,
            weights=_tiny_weights,
            grouped_heads=False,
        ),
        parallel=ParallelLimits(tensor_divides=("num_attention_heads", "intermediate_size")),
        sequence_parallel=True,
        argument_folder="opt",
        understood=(*_FIELDS, *_FIXED, *_OF_THE_CLASS, "activation_function", "n_ctx"),
        adapt_config=_adapt_config,
        tensor_splits=TENSOR_SPLITS | {"query_key_value_proj": "query_key_value"},
    )
)
