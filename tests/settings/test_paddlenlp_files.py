"""Argument files that people have for PaddleNLP's finetune_generation.py run unchanged.

Keys and values as they stand in such files of PaddleNLP 2.6 to 3.0.
"""

import json

import pytest

from finetune.errors import UserError
from finetune.settings.arguments import parse_arguments

pytestmark = pytest.mark.usefixtures("in_a_folder_with_data")


# Argument files written for PaddleNLP 2.6 to 3.0

COMMON = {
    "dataset_name_or_path": "./data",
    "output_dir": "./checkpoints/sft_ckpts",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "per_device_eval_batch_size": 8,
    "eval_accumulation_steps": 16,
    "num_train_epochs": 3,
    "learning_rate": 3e-05,
    "warmup_steps": 30,
    "logging_steps": 1,
    "evaluation_strategy": "epoch",
    "save_strategy": "epoch",
    "src_length": 1024,
    "max_length": 2048,
    "fp16": True,
    "fp16_opt_level": "O2",
    "do_train": True,
    "do_eval": True,
    "disable_tqdm": True,
    "load_best_model_at_end": True,
    "eval_with_do_generation": False,
    "metric_for_best_model": "accuracy",
    "recompute": True,
    "save_total_limit": 1,
}
ONE_CARD = {"tensor_parallel_degree": 1, "pipeline_parallel_degree": 1}
BF16 = {"fp16": False, "bf16": True}
LONG_RUN = {
    **{"num_train_epochs": None, "max_steps": 12000, "learning_rate": 2e-05, "warmup_steps": None},
    **{"warmup_ratio": 0.03, "evaluation_strategy": "no", "save_strategy": "no", "src_length": 8000},
    **{"max_length": 8192, "do_eval": False, "tensor_parallel_degree": 2, "pipeline_parallel_degree": 1},
    **{"pipeline_parallel_config": "disable_p2p_cache_shape", "sharding": "stage2", "zero_padding": True},
    **{"unified_checkpoint": True, "tensor_parallel_output": True, "use_flash_attention": True},
    **{"greedy_zero_padding": True, "lazy": True, "flash_mask": True},
}
FUSED = dict.fromkeys(
    (
        "fuse_attention_qkv",
        "fuse_attention_ffn",
        "use_fused_rms_norm",
        "use_fused_rope",
        "use_flash_attention",
    ),
    True,
)
# name: (differences from COMMON, settings that need more than one process)
PADDLENLP_FILES = {
    "llama sft": (
        {
            **{
                "model_name_or_path": "facebook/llama-7b",
                "tensor_parallel_degree": 4,
                "pipeline_parallel_degree": 1,
            },
            **{"zero_padding": True, "use_sparse_mask": True, "use_flash_attention": True},
        },
        {"tensor_parallel_degree"},
    ),
    "llama sft_pp": (
        {
            **{"model_name_or_path": "facebook/llama-7b", "metric_for_best_model": None, "src_length": 256},
            **{"max_length": 512, "tensor_parallel_degree": 2, "pipeline_parallel_degree": 2},
            "pipeline_parallel_config": "disable_p2p_cache_shape",
        },
        {"tensor_parallel_degree"},
    ),
    "llama lora": (
        {**ONE_CARD, "model_name_or_path": "facebook/llama-7b", "lora": True, "zero_padding": False},
        set(),
    ),
    "llama lora, intokens": (
        {**ONE_CARD, "model_name_or_path": "facebook/llama-7b", "lora": True, "intokens": True},
        set(),
    ),
    "llama pt": ({**ONE_CARD, "model_name_or_path": "facebook/llama-7b", "prefix_tuning": True}, set()),
    "llama 3 sft": (
        {
            **{**ONE_CARD, **BF16, "model_name_or_path": "meta-llama/Meta-Llama-3-8B", "zero_padding": False},
            **{
                "pipeline_parallel_config": "disable_p2p_cache_shape",
                "sharding": "stage2",
                "recompute": False,
            },
            **{"unified_checkpoint": True, "use_flash_attention": False},
        },
        set(),
    ),
    "llama 3 lora": (
        {
            **{
                **ONE_CARD,
                **BF16,
                "model_name_or_path": "meta-llama/Meta-Llama-3-8B",
                "evaluation_strategy": "steps",
            },
            **{
                "save_strategy": "steps",
                "save_steps": 1,
                "do_eval": False,
                "sharding": "stage1",
                "lora": True,
            },
            **{
                "zero_padding": False,
                "use_flash_attention": True,
                "unified_checkpoint": True,
                "pissa": False,
            },
        },
        set(),
    ),
    "llama long": (
        {
            **{**LONG_RUN, **BF16, "model_name_or_path": "meta-llama/Meta-Llama-3.1-8B-Instruct"},
            **{
                "use_fused_head_and_loss_fn": True,
                "use_sparse_head_and_loss_fn": True,
                "autotuner_benchmark": False,
            },
        },
        {"tensor_parallel_degree"},
    ),
    "llama, fused": (
        {
            **{
                **ONE_CARD,
                **FUSED,
                "model_name_or_path": "meta-llama/Llama-2-7b",
                "recompute_granularity": "full",
            },
            **{"virtual_pp_degree": 1, "sequence_parallel": False, "no_recompute_layers": None},
            **{"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "pp_recompute_interval": 1},
            **{
                "recompute_use_reentrant": False,
                "benchmark": False,
                "decay_steps": 0,
                "continue_training": True,
            },
        },
        set(),
    ),
    "llama, off switches": (
        {
            **{**ONE_CARD, "model_name_or_path": "facebook/llama-7b", "do_ptq": False, "do_qat": False},
            **{
                "do_gptq": False,
                "ptq_step": 16,
                "quant_type": "a8w8",
                "weight_quantize_algo": None,
                "vera": False,
            },
            **{"use_long_sequence_strategies": False, "rope_scaling_factor": 1.0, "strategy_type": None},
        },
        set(),
    ),
    "chatglm2 sft": (
        {"model_name_or_path": "THUDM/chatglm2-6b", "sharding_parallel_degree": 4, "sharding": "stage3"},
        {"sharding_parallel_degree"},
    ),
    "chatglm2 lora": (
        {**ONE_CARD, "model_name_or_path": "THUDM/chatglm2-6b", "lora": True, "unified_checkpoint": True},
        set(),
    ),
    "qwen pt": ({**ONE_CARD, **BF16, "model_name_or_path": "qwen/qwen-7b", "prefix_tuning": True}, set()),
    "qwen function calls": (
        {
            **{
                **ONE_CARD,
                "model_name_or_path": "qwen/qwen-7b-chat",
                "do_train": False,
                "disable_tqdm": False,
            },
            **{"lora": True, "zero_padding": False, "chat_template": None},
        },
        set(),
    ),
    "qwen sft": (
        {
            **{**ONE_CARD, **FUSED, "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct", "sharding": "stage2"},
            **{"zero_padding": True, "unified_checkpoint": True, "use_fused_linear_cross_entropy": True},
        },
        set(),
    ),
    "bloom sft": (
        {
            "model_name_or_path": "bigscience/bloomz-7b1-mt",
            "tensor_parallel_degree": 4,
            "pipeline_parallel_degree": 1,
        },
        {"tensor_parallel_degree"},
    ),
    "bloom pt": (
        {**ONE_CARD, "model_name_or_path": "bigscience/bloomz-7b1-mt", "prefix_tuning": True},
        set(),
    ),
    "opt sft": (
        {"model_name_or_path": "facebook/opt-125m", "sharding_parallel_degree": 4, "sharding": "stage2"},
        {"sharding_parallel_degree"},
    ),
    "opt lora": ({**ONE_CARD, "model_name_or_path": "facebook/opt-125m", "lora": True}, set()),
    "generation": (
        {
            **{**ONE_CARD, "model_name_or_path": "facebook/opt-125m", "eval_with_do_generation": True},
            **{
                "metric_for_best_model": "rougel",
                "save_generation_output": True,
                "task_name_or_path": "./data",
            },
            **{"dataset_name_or_path": None, "top_k": 1, "top_p": 0.7},
        },
        set(),
    ),
    "August 2023, llama sft": (
        {
            "model_name_or_path": "facebook/llama-7b",
            "tensor_parallel_degree": 4,
            "pipeline_parallel_degree": 1,
        },
        {"tensor_parallel_degree"},
    ),
    "August 2023, bloom pt": (
        {
            **ONE_CARD,
            "model_name_or_path": "bigscience/bloomz-560m",
            "prefix_tuning": True,
            "learning_rate": 0.03,
        },
        set(),
    ),
    "August 2023, lora of an extended vocabulary": (
        {
            **{**ONE_CARD, "model_name_or_path": "owner/new_vocab_model", "sharding": "stage1"},
            **{"lora": True, "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05, "intokens": False},
            **{"modules_to_save": "embed_tokens,lm_head", "lr_scheduler_type": "cosine", "max_steps": 2000},
            **{"warmup_steps": None, "warmup_ratio": 0.03, "evaluation_strategy": "steps", "eval_steps": 50},
            **{
                "save_strategy": "steps",
                "save_steps": 50,
                "eval_with_do_generation": True,
                "weight_decay": 0.0,
            },
            **{"metric_for_best_model": "rougel", "recompute": False, "lora_trainable": "q_proj,v_proj"},
        },
        set(),
    ),
    "November 2023, chatglm2 pt": (
        {
            **{**ONE_CARD, "model_name_or_path": "THUDM/chatglm2-6b", "prefix_tuning": True},
            **{"zero_padding": False, "use_flash_attention": False, "learning_rate": 0.03},
        },
        set(),
    ),
    "November 2023, llama lora": (
        {
            **{**ONE_CARD, "model_name_or_path": "facebook/llama-7b", "lora": True, "intokens": False},
            **{"use_flash_attention": False, "learning_rate": 3e-4},
        },
        set(),
    ),
    "December 2023, llama sft": (
        {
            **{"model_name_or_path": "facebook/llama-7b", "tensor_parallel_degree": 4},
            **{
                "pipeline_parallel_degree": 1,
                "intokens": True,
                "zero_padding": False,
                "use_flash_attention": False,
            },
        },
        {"tensor_parallel_degree"},
    ),
    "December 2023, llama sft of 13B": (
        {
            **{"model_name_or_path": "facebook/llama-13b", "tensor_parallel_degree": 4, "intokens": False},
            **{"pipeline_parallel_degree": 1, "zero_padding": False, "use_flash_attention": False},
            **{"evaluation_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": False},
            **{"metric_for_best_model": "bleu4", "eval_with_do_generation": True},
            **{"pipeline_parallel_config": "disable_batch_p2p_comm", "gradient_accumulation_steps": 8},
        },
        {"tensor_parallel_degree"},
    ),
    "June 2024, llama lora pissa": (
        {
            **{
                **ONE_CARD,
                **BF16,
                "model_name_or_path": "meta-llama/Llama-2-7b",
                "lora": True,
                "pissa": True,
            },
            **{
                "lora_rank": 128,
                "zero_padding": False,
                "use_flash_attention": True,
                "unified_checkpoint": True,
            },
        },
        set(),
    ),
    "June 2024, qwen lora": (
        {
            **{**BF16, "model_name_or_path": "Qwen/Qwen2-7B", "tensor_parallel_degree": 4, "lora": True},
            **{
                "pipeline_parallel_degree": 1,
                "unified_checkpoint": True,
                "zero_padding": False,
                "pissa": False,
            },
            "use_flash_attention": True,
        },
        {"tensor_parallel_degree"},
    ),
    "June 2024, llama pt": (
        {
            **{**ONE_CARD, **BF16, "model_name_or_path": "meta-llama/Meta-Llama-3-8B", "prefix_tuning": True},
            **{"zero_padding": False, "use_flash_attention": True, "learning_rate": 0.03},
        },
        set(),
    ),
    "January 2025, qwen 0.5B": (
        {
            **{**ONE_CARD, **FUSED, "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct", "sharding": "stage2"},
            **{"zero_padding": True, "unified_checkpoint": True, "use_fused_linear_cross_entropy": True},
            **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "recompute": None},
        },
        set(),
    ),
    "January 2025, distilled answers": (
        {
            **{**ONE_CARD, **BF16, "model_name_or_path": "Qwen/Qwen2.5-Math-7B", "sharding": "stage2"},
            **{"fp16": None, "evaluation_strategy": "no", "do_eval": False, "eval_steps": 10},
            **{"load_best_model_at_end": False, "src_length": 8192, "max_length": 16384, "flash_mask": True},
            **{"zero_padding": True, "unified_checkpoint": True, "use_flash_attention": True},
        },
        set(),
    ),
    "January 2025, lora with the switches of its relatives": (
        {
            **{**ONE_CARD, **BF16, "model_name_or_path": "meta-llama/Meta-Llama-3-8B", "lora": True},
            **{"use_mora": False, "lora_use_mixer": False, "rslora": False, "lora_plus_scale": 4},
            **{"enable_auto_parallel": False, "to_static": False, "max_steps": 100, "num_train_epochs": None},
        },
        set(),
    ),
}


def test_there_are_files_of_every_time():
    assert len(PADDLENLP_FILES) >= 30
    for time in ("August 2023", "November 2023", "December 2023", "June 2024", "January 2025"):
        assert any(name.startswith(time) for name in PADDLENLP_FILES)


@pytest.mark.parametrize("name", PADDLENLP_FILES)
def test_argument_files_of_paddlenlp_parse(name, tmp_path, monkeypatch):
    differences, waiting = PADDLENLP_FILES[name]
    settings = {**COMMON, **differences}
    path = tmp_path / "paddlenlp.json"
    path.write_text(json.dumps(settings))
    if waiting:  # the only faults are of the number of processes
        with pytest.raises(UserError) as caught:
            parse_arguments([str(path)])
        assert {fault.split()[0] for fault in caught.value.faults} == waiting
    else:
        parse_arguments([str(path)])
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    arguments = parse_arguments([str(path)])
    assert arguments.model.model_name_or_path == settings["model_name_or_path"]
    assert arguments.data.dataset_name_or_path == "./data"
    assert arguments.training.learning_rate == settings["learning_rate"]
