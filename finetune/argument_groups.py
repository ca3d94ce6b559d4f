"""The groups of settings that are this project's own; PaddleNLP's training group is kept as data beside them.

The help text stands beside each field. A field's type must be one that ``argument_settings.Setting`` lists.
"""

from dataclasses import dataclass, field
from typing import Any

# The keys of `finetune.data.formats.FORMATS`.
DATASET_FORMATS = ("src_tgt", "alpaca", "query_response", "messages", "sharegpt", "text", "preference")


def _setting(default: Any, help_text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(kw_only=True)
class ModelArguments:
    """Which weights, which method, and the options PaddleNLP's model configuration takes."""

    model_name_or_path: str | None = _setting(
        None, "Folder with the weights, or a model name on the hub. Required."
    )
    tokenizer_name_or_path: str | None = _setting(
        None, "Folder or name of the tokenizer; null: the model's own."
    )
    lora: bool = _setting(False, "Train low-rank updates (LoRA) instead of all weights.")
    lora_path: str | None = _setting(None, "Adapter folder that LoRA starts from.")
    lora_rank: int = _setting(8, "Rank of the LoRA update.")
    lora_alpha: float | None = _setting(
        None, "The LoRA update is scaled by lora_alpha / lora_rank; null: 2 x lora_rank."
    )
    lora_dropout: float = _setting(0.0, "Dropout on the input of the LoRA update.")
    lora_target_modules: list[str] | None = _setting(  # noqa: RUF009 (the call builds a field)
        None, "Patterns of the linear layers that LoRA adapts; null: what suits the model family."
    )
    modules_to_save: list[str] | None = _setting(  # noqa: RUF009 (the call builds a field)
        None,
        "Modules that LoRA trains and saves whole, by the last part of their names: "
        "embed_tokens,lm_head for new tokens; null: none.",
    )
    rslora: bool = _setting(False, "Scale the LoRA update by lora_alpha / sqrt(lora_rank) (rsLoRA).")
    lora_plus_scale: float = _setting(1.0, "Factor on the learning rate of LoRA's B matrices (LoRA+).")
    pissa: bool = _setting(False, "Start LoRA from the weight's leading singular vectors (PiSSA).")
    prefix_tuning: bool = _setting(False, "Train key and value prefixes instead of weights.")
    prefix_path: str | None = _setting(None, "Prefix folder that prefix tuning starts from.")
    num_prefix_tokens: int = _setting(128, "Length of the trained prefix, in tokens.")
    neftune: bool = _setting(False, "Add uniform noise to the embeddings in training (NEFTune).")
    neftune_noise_alpha: float = _setting(
        5.0, "NEFTune noise is bounded by alpha / sqrt(length x hidden size)."
    )
    use_flash_attention: bool = _setting(False, "Use the flash attention kernel (GPU).")
    fuse_attention_qkv: bool | None = _setting(
        None, "Hold query, key and value projections as one matrix; null: as the model's configuration says."
    )
    fuse_attention_ffn: bool | None = _setting(
        None, "Hold gate and up projections as one matrix; null: as the model's configuration says."
    )
    use_fused_rms_norm: bool = _setting(False, "Use the fused RMSNorm kernel (GPU).")
    use_fused_rope: bool = _setting(False, "Use the fused rotary embedding kernel (GPU).")
    use_fused_linear: bool = _setting(False, "Use linear layers with the bias fused in (GPU).")
    use_fused_dropout_add: bool = _setting(False, "Use the fused dropout and residual kernel (GPU).")
    use_fused_linear_cross_entropy: bool = _setting(False, "Fuse the output projection with the loss (GPU).")
    recompute_granularity: str = _setting(
        "full", "How much recompute runs again in the backward pass.", ("full", "full_attn", "core_attn")
    )
    no_recompute_layers: list[int] | None = _setting(  # noqa: RUF009 (the call builds a field)
        None, "Indices of layers that are not recomputed."
    )
    pp_recompute_interval: int = _setting(
        1, "Without effect: recompute and no_recompute_layers choose the layers."
    )
    recompute_use_reentrant: bool = _setting(False, "Use Paddle's PyLayer form of recompute.")
    offload_recompute_inputs: bool = _setting(False, "Keep the inputs of recomputed layers in host memory.")
    virtual_pp_degree: int = _setting(
        1, "Chunks of layers per pipeline stage (needs a pipeline_parallel_degree above 1)."
    )
    tensor_parallel_output: bool = _setting(
        False, "Without effect: split logits stay split while the loss is computed."
    )
    hang_timeout: int = _setting(
        600, "Seconds without progress on some process after which all say what they do; 0: never."
    )
    rehearse_half_precision: bool = _setting(
        False,
        "On CPU, compute in the bf16 or fp16 of the file as a GPU does, several times as slowly as in float32; "
        "false: half precision is turned off there.",
    )
    max_skipped_steps: int = _setting(
        20, "float16 steps skipped in a row, because gradients overflowed, after which the run stops."
    )
    replica_check_steps: int = _setting(
        0,
        "Compare weights that must agree across processes every n steps, beside start and saves; 0: only there.",
    )
    hidden_dropout_prob: float | None = _setting(
        None, "Dropout of hidden states; null: as the model's configuration."
    )
    attention_probs_dropout_prob: float | None = _setting(
        None, "Dropout of attention weights; null: as the model's configuration."
    )
    from_aistudio: bool = _setting(False, "Look model names up on AI Studio.")
    save_to_aistudio: bool = _setting(False, "Upload the final weights to AI Studio.")
    aistudio_repo_id: str | None = _setting(None, "AI Studio repository to upload to.")
    aistudio_repo_private: bool = _setting(True, "Create the AI Studio repository as private.")
    aistudio_repo_license: str = _setting("Apache License 2.0", "Licence named in the AI Studio repository.")
    aistudio_token: str | None = _setting(None, "AI Studio access token; never written to arguments.json.")


# Settings of ModelArguments that go into the model's configuration (PaddleNLP adds the first block to every one).
MODEL_CONFIG_SETTINGS = (
    "use_flash_attention",
    "use_fused_rms_norm",
    "use_fused_rope",
    "use_fused_linear",
    "use_fused_dropout_add",
    "use_fused_linear_cross_entropy",
    "recompute_granularity",
    "no_recompute_layers",
    "pp_recompute_interval",
    "recompute_use_reentrant",
    "offload_recompute_inputs",
    "virtual_pp_degree",
    "tensor_parallel_output",
    # null in these means "leave the configuration alone"
    "fuse_attention_qkv",
    "fuse_attention_ffn",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
)


@dataclass(kw_only=True)
class DataArguments:
    """Where the samples come from and how they become rows of tokens."""

    dataset_name_or_path: str | None = _setting(
        None,
        "Folder with train.json and dev.json (or train/ and dev/), a file (.json, .jsonl, .csv), several of "
        "these with commas between, or a built-in dataset name. Required unless dataset_mix is given.",
    )
    task_name: str | None = _setting(None, "Part of a built-in dataset to use.")
    dataset_format: str | None = _setting(
        None, "Shape of the examples; null: recognised from the first ones.", DATASET_FORMATS
    )
    dataset_mix: list[dict] | None = _setting(  # noqa: RUF009 (the call builds a field)
        None,
        'Several training sets: a list of {"path": ..., "ratio": weight, "max_samples": n}; '
        "as JSON on the command line.",
    )
    preference: str | None = _setting(
        None, "What to learn from preference pairs; null: such files are refused.", ("chosen",)
    )
    validation_split: float | None = _setting(
        None, "Held back from the training data when there is no dev file: a ratio below 1, or a count."
    )
    max_train_samples: int | None = _setting(None, "Most training examples, drawn by the seed.")
    max_eval_samples: int | None = _setting(None, "Most evaluation examples, drawn by the seed.")
    on_bad_line: str = _setting(
        "error", "What a faulty line does: stop the run, or be left out and counted.", ("error", "skip")
    )
    self_cognition_samples: int = _setting(
        0, "Examples added that teach the model its name (model_name) and maker (model_author)."
    )
    self_cognition_file: str | None = _setting(
        None, "Questions and answers with {{name}} and {{author}} in them; null: our own."
    )
    model_name: str | None = _setting(
        None, 'Name the model shall know; a Chinese and an English one as "中文名 English".'
    )
    model_author: str | None = _setting(None, "Who made the model, in the same form.")
    src_length: int = _setting(1024, "Most tokens kept of the source; cut from the left.")
    max_length: int = _setting(2048, "Most tokens of source and target together.")
    truncation: str = _setting(
        "left",
        "Samples that are too long: left cuts the source on the left and then the target on the right, right "
        "cuts at max_length, drop leaves them out, error stops the run.",
        ("left", "right", "drop", "error"),
    )
    train_on: str = _setting("all", "Which answers of a conversation are learned.", ("all", "last"))
    zero_padding: bool = _setting(False, "Pack samples into full rows (InTokens); also accepted as intokens.")
    pad_to_multiple_of: int | None = _setting(None, "Pad rows to a multiple of this many tokens.")
    eval_with_do_generation: bool = _setting(
        False, "Evaluate by generating text (BLEU-4, ROUGE) instead of by loss."
    )
    save_generation_output: bool = _setting(
        False, "Write the text generated in evaluation to generated_output.json."
    )
    preview: int = _setting(
        0, "Show this many training samples, and figures of all of them, instead of training; 0: train."
    )
    data_cache: bool = _setting(True, "Keep tokenized data on disk for the next run with the same files.")
    data_cache_dir: str | None = _setting(
        None, "Where they are kept; null: ~/.cache/paddle_finetune/data (XDG_CACHE_HOME is honoured)."
    )
    lazy: bool = _setting(
        False,
        "Read the training data as a stream instead of loading it: for files larger than memory. Needs max_steps.",
    )
    shuffle_buffer_size: int = _setting(
        10_000, "Samples of a stream that the next one is drawn from; 1: the order of the files."
    )
    chat_template: str | None = _setting(
        None,
        "Name of a conversation format (llama2, chatml, ...; see docs/data.md), a template file, or tokenizer "
        "for the tokenizer's own; null: the texts as they are.",
    )
    system: str | None = _setting(
        None, "System text of examples that have none; null: the template's, if any."
    )

    @property
    def intokens(self) -> bool:
        """The earlier name of ``zero_padding``."""
        return self.zero_padding


@dataclass(kw_only=True)
class GenerationArguments:
    """How text is generated, in evaluation and prediction."""

    max_new_tokens: int | None = _setting(None, "Most tokens to generate; null: what is left of max_length.")
    top_k: int = _setting(1, "Sample among the k likeliest tokens; 1: greedy, 0: no limit.")
    top_p: float = _setting(1.0, "Sample among the likeliest tokens that hold this share of probability.")
    temperature: float = _setting(1.0, "Divide the logits by this before sampling.")


@dataclass(kw_only=True)
class QuantArguments:
    """Quantisation switches of PaddleNLP's later scripts: known, but only their off values are accepted so far."""

    weight_quantize_algo: str | None = _setting(
        None, "Train adapters over quantised weights (not available yet)."
    )
    do_ptq: bool = _setting(False, "Quantise after training (not available yet).")
    do_qat: bool = _setting(False, "Train with quantisation in the loop (not available yet).")
    do_gptq: bool = _setting(False, "Quantise with GPTQ (not available yet).")
    do_awq: bool = _setting(False, "Quantise with AWQ (not available yet).")
    quant_type: str = _setting("a8w8", "Number format of quantised weights (not available yet).")
    shift: bool = _setting(False, "Shift activations before quantising (not available yet).")
    smooth: bool = _setting(False, "Smooth activations before quantising (not available yet).")
    auto_clip: bool = _setting(False, "Clip weights before quantising (not available yet).")
    load_quant_model: bool = _setting(False, "Start from quantised weights (not available yet).")


GROUPS: dict[str, type] = {
    "model": ModelArguments,
    "data": DataArguments,
    "generation": GenerationArguments,
    "quant": QuantArguments,
}
