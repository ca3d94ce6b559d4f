"""Settings of PaddleNLP's fine-tuning scripts that have no place here, each with what to do instead.

An argument file written for PaddleNLP may carry them at their off value and runs unchanged; switched on they
are refused by name (``REFUSED``), or reported as ignored where the result does not depend on them
(``WITHOUT_EFFECT``).
"""

import re
from collections.abc import Mapping
from typing import Any

from finetune.argument_settings import known_settings

_LORA_INSTEAD = "use lora, with rslora or pissa if need be"
_QUANT_INSTEAD = (
    "fine-tune in bf16 or fp16 here and quantise the merged model with PaddleNLP's llm/run_quantization.py"
)
_LONG_INSTEAD = "use a checkpoint whose configuration already scales its rotary embedding"
_BENCHMARK_INSTEAD = "set max_steps, do_eval false and save_strategy no for a timing run"

# name -> (values that mean "off", what to do instead)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "vera": ((False,), _LORA_INSTEAD),
    "lokr": ((False,), _LORA_INSTEAD),
    "reft": ((False,), _LORA_INSTEAD),
    "use_mora": ((False,), _LORA_INSTEAD),
    "lora_use_mixer": ((False,), _LORA_INSTEAD),
    "dislora": ((False,), _LORA_INSTEAD),
    "hqlora": ((False,), _LORA_INSTEAD),
    "lqlora": ((False,), _LORA_INSTEAD),
    "use_quick_lora": ((False,), "use lora; it gives the same weights"),
    "lokr_path": ((), "use lora_path"),
    "weight_double_quant": ((False,), _QUANT_INSTEAD),
    "use_long_sequence_strategies": ((False,), _LONG_INSTEAD),
    "strategy_type": ((), _LONG_INSTEAD),
    "strategy_name": ((), _LONG_INSTEAD),
    "rope_scaling_factor": ((1.0, 1), _LONG_INSTEAD),
    "hqlora_quantize_cfg": ((), _LORA_INSTEAD),
    "use_shift_sparse_attention": (
        (False,),
        "lower max_length, or use recompute, to save memory on long rows",
    ),
    "use_ssa": ((False,), "lower max_length, or use recompute, to save memory on long rows"),
    "use_pose_convert": ((False,), "raise max_length, or shorten the samples"),
    "autoregressive": ((False,), "give the text as target with an empty source"),
    "continue_training": ((True,), "start from weights; `python -m finetune.models.tiny` writes random ones"),
    "benchmark": ((False,), _BENCHMARK_INSTEAD),
    "autotuner_benchmark": ((False,), _BENCHMARK_INSTEAD),
    "use_moe": ((False,), "use a dense model family"),
}

# The same for settings that are fields of QuantArguments.
REFUSED_QUANT: dict[str, tuple[tuple[Any, ...], str]] = {
    "weight_quantize_algo": ((None,), "use lora over bf16 or fp16 weights, with recompute to save memory"),
    "do_ptq": ((False,), _QUANT_INSTEAD),
    "do_qat": ((False,), _QUANT_INSTEAD),
    "do_gptq": ((False,), _QUANT_INSTEAD),
    "do_awq": ((False,), _QUANT_INSTEAD),
    "quant_type": (("a8w8",), _QUANT_INSTEAD),
    "shift": ((False,), _QUANT_INSTEAD),
    "smooth": ((False,), _QUANT_INSTEAD),
    "auto_clip": ((False,), _QUANT_INSTEAD),
    "load_quant_model": ((False,), "start from the weights before quantisation"),
}

_BELONGS_TO_OFF_SWITCH = "it belongs to a method that is switched off"
_PACKING_CHOOSES = "packing makes its own choice"

# name -> why it changes nothing here
WITHOUT_EFFECT: dict[str, str] = {
    **dict.fromkeys(
        (
            *(
                "vera_rank",
                "lokr_dim",
                "weight_blocksize",
                "weight_double_quant_block_size",
                "ssa_group_size_ratio",
            ),
            *(
                "fp8_type",
                "skip_list_names",
                "weight_quant_method",
                "act_quant_method",
                "cachekv_quant_method",
            ),
            *("search_alpha_min", "search_alpha_max", "search_scale_min", "search_scale_max", "ptq_step"),
            *("shift_all_linears", "shift_sampler", "shift_step", "smooth_all_linears", "smooth_sampler"),
            *("smooth_step", "smooth_piecewise_search", "smooth_k_piece", "smooth_search_piece", "gptq_step"),
            *("awq_step", "autoclip_step", "do_quant_debug", "test_sample"),
        ),
        _BELONGS_TO_OFF_SWITCH,
    ),
    "greedy_zero_padding": _PACKING_CHOOSES,
    "flash_mask": _PACKING_CHOOSES,
    "use_sparse_mask": _PACKING_CHOOSES,
    "pad_to_max_length": "rows are padded to the longest of their batch, which trains the same",
    "use_fused_head_and_loss_fn": "use_fused_linear_cross_entropy is the switch of the fused loss",
    "use_sparse_head_and_loss_fn": "use_fused_linear_cross_entropy is the switch of the fused loss",
    "enable_linear_fused_grad_add": "only PaddleNLP's pre-training script has it",
    "use_fast_layer_norm": "only GPT-3 models have it",
    "decay_steps": "fine-tuning schedules end with the last step",
    "max_seq_length": "max_length is the limit here",
    "dataset_text_field": "samples have src and tgt",
    "dataset_num_proc": "samples are prepared in this process",
    "dataset_batch_size": "samples are prepared one by one",
    "model_init_kwargs": "each model option is a setting of its own",
    "dataset_kwargs": "each data option is a setting of its own",
    "eval_packing": "evaluation rows are never packed",
    "tensor_parallel_rank": "the launcher gives each process its rank",
}


_OWN_CHECKPOINTS = "checkpoints here always hold what a run continues with"
_WHOLE_TENSORS = "checkpoints here hold whole tensors, which any layout of processes reads"
_OWN_EXCHANGE = "gradients are exchanged by this trainer itself"
_ONLY_AUTO_PARALLEL = "only PaddleNLP's automatic parallelism has it"
_ONLY_EXPERTS = "no model family here has experts"
_WHOLE_EVALUATION = "every evaluation sees the whole dev set; make it smaller with max_eval_samples"

# Settings of PaddleNLP's TrainingArguments that this trainer has no use for -> why.
TRAINING_WITHOUT_EFFECT: dict[str, str] = {
    "max_evaluate_steps": _WHOLE_EVALUATION,
    "minimum_eval_times": "evaluation_strategy and eval_steps say when to evaluate",
    "prediction_loss_only": "evaluation never gathers logits",
    "eval_accumulation_steps": "evaluation keeps nothing on the device from batch to batch",
    "skip_data_intervals": "every optimizer step consumes its own global batch",
    "ignore_data_skip": "a resumed run finds its place in the data at once",
    "ignore_save_lr_and_optim": _OWN_CHECKPOINTS,
    "ignore_load_lr_and_optim": _OWN_CHECKPOINTS,
    "use_async_save": "checkpoints are written before training goes on",
    "do_predict": "evaluate with do_eval and eval_with_do_generation",
    "do_export": "a static graph is not exported by this command",
    "count_trained_tokens": "tokens are always counted",
    "metrics_output_path": "train_log.jsonl holds every logged step",
    # Parallel training
    "save_sharded_model": _WHOLE_TENSORS,
    "load_sharded_model": _WHOLE_TENSORS,
    "save_sharding_stage1_model_include_freeze_params": _WHOLE_TENSORS,
    "force_reshard_pp": _WHOLE_TENSORS,
    "auto_parallel_resume_form_hybrid_parallel": _WHOLE_TENSORS,
    "ckpt_quant_stage": "optimizer state is saved as it is",
    "ordered_save_group_size": "checkpoints are written in one order",
    "distributed_dataloader": "every process reads its own samples",
    "hybrid_parallel_topo_order": "results do not depend on the order of the axes, which is that of pp_first",
    "pp_recompute_interval": "recompute and no_recompute_layers choose the layers",
    "fuse_sequence_parallel_allreduce": _OWN_EXCHANGE,
    "sharding_comm_buffer_size_MB": _OWN_EXCHANGE,
    "ddp_find_unused_parameters": _OWN_EXCHANGE,
    "release_grads": _OWN_EXCHANGE,
    "sharding_parallel_mesh_dimension": _ONLY_AUTO_PARALLEL,
    "split_inputs_sequence_dim": "rows are split by sequence_parallel only",
    "expert_max_capacity": _ONLY_EXPERTS,
    "expert_min_capacity": _ONLY_EXPERTS,
    "tensor_parallel_output": "the logits stay split while the loss is computed, which gives the same",
}
# Quietly accepted: their values change nothing, and many existing files carry them.
_QUIET = frozenset(
    {
        *("eval_accumulation_steps", "count_trained_tokens", "prediction_loss_only"),
        *("tensor_parallel_output", "ddp_find_unused_parameters", "split_inputs_sequence_dim"),
        *("fuse_sequence_parallel_allreduce", "release_grads", "expert_max_capacity", "expert_min_capacity"),
    }
)
# Values that ask for what is done anyway.
_QUIET_VALUES: dict[str, Any] = {"hybrid_parallel_topo_order": "pp_first"}

# Settings that hold words for Fleet's own pipeline, sharding and so on, whose place is taken by
# finetune.parallel -> the words PaddleNLP knows. They change speed or memory there, never the result,
# so they are accepted; a word that is not known is a slip of the pen.
PARALLEL_WORDS: dict[str, frozenset[str]] = {
    "data_parallel_config": frozenset(
        {"enable_allreduce_avg_in_gradinent_scale", "gradient_sync_after_accumulate"}
    ),
    "sequence_parallel_config": frozenset({"enable_allreduce_avg_in_gradinent_scale"}),
    "tensor_parallel_config": frozenset(
        {
            *("enable_mp_async_allreduce", "enable_mp_skip_c_identity"),
            *("enable_mp_fused_linear_param_grad_add", "enable_sp_async_reduce_scatter"),
            *("enable_delay_scale_loss", "sync_param", "sync_grad", "sync_moment"),
            *("replace_with_c_embedding", "replace_with_parallel_cross_entropy"),
        }
    ),
    "pipeline_parallel_config": frozenset(
        {
            *("disable_p2p_cache_shape", "disable_partial_send_recv", "enable_delay_scale_loss"),
            *("enable_dp_comm_overlap", "enable_sharding_comm_overlap", "enable_timer"),
            *("enable_release_grads", "enable_clear_every_step_cache", "enable_overlap_p2p_comm"),
            *("disable_batch_p2p_comm", "disable_non_batch_p2p_comm", "best_unbalanced_scheduler"),
            *("use_dualpipev", "enable_send_recv_overlap", "enable_split_backward"),
        }
    ),
    "sharding_parallel_config": frozenset(
        {
            *("enable_stage1_tensor_fusion", "enable_stage1_overlap", "enable_stage2_overlap"),
            *("enable_stage1_broadcast_overlap", "enable_stage1_allgather_overlap"),
            *("enable_tensor_fusion", "enable_overlap", "enable_release_grads"),
            *("enable_fuse_optimizer_states", "disable_stage1_reduce_avg", "split_param"),
        }
    ),
    "unified_checkpoint_config": frozenset(
        {
            *("skip_save_model_weight", "master_weight_compatible", "remove_master_weight", "async_save"),
            *("enable_all_options", "ignore_merge_optimizer"),
        }
    ),
}

_OFF_DEGREES = (-1, 0, 1, None)
_LONG_ROWS = "set it to 1; for long rows use tensor_parallel_degree with sequence_parallel, or recompute"

# Settings with the values that work here, and what to do about the others.
SUPPORTED_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "optim": (("adamw",), "use adamw"),
    "from_aistudio": (
        (False, None),
        "download the repository with AI Studio's own client and give its folder as model_name_or_path",
    ),
    "to_static": ((False, None), "leave it off: training runs in dynamic graphs"),
    "flatten_param_grads": ((False, None), "leave it off: it is for NPU devices"),
    "enable_auto_parallel": ((False, None), "leave it off: layouts are given by their degrees"),
    "sep_parallel_degree": (_OFF_DEGREES, _LONG_ROWS),
    "context_parallel_degree": (_OFF_DEGREES, _LONG_ROWS),
    "expert_parallel_degree": (_OFF_DEGREES, "set it to 1: no model family here has experts"),
    "expert_tensor_parallel_degree": (_OFF_DEGREES, "set it to 1: no model family here has experts"),
    "use_expert_parallel": ((False, None), "leave it off: no model family here has experts"),
    "offload_optim": ((False, None), "leave it off: sharding spreads the optimizer state over processes"),
}


def list_training_ignored(values: Mapping[str, Any], given: frozenset[str]) -> list[str]:
    """One line for each training setting that was switched on and does nothing here."""
    return [
        f"{name} has no effect here: {reason}"
        for name, reason in TRAINING_WITHOUT_EFFECT.items()
        if name in given and name not in _QUIET and _is_switched_on(name, values[name])
    ]


def _is_switched_on(name: str, value: Any) -> bool:
    if value in (None, False, "", -1, 0) or value == _QUIET_VALUES.get(name):
        return False
    return value != known_settings()[name].default


def find_unknown_words(name: str, value: str | None) -> str | None:
    """The fault line for words of a setting in `PARALLEL_WORDS` that nobody knows; None without any."""
    unknown = [word for word in re.split(r"[\s,]+", value or "") if word and word not in PARALLEL_WORDS[name]]
    if not unknown:
        return None
    listed = ", ".join(f'"{word}"' for word in unknown)
    return f'{name} is "{value}", of which {listed} is not known: choose from {", ".join(sorted(PARALLEL_WORDS[name]))}'


def find_refusals(extras: Mapping[str, Any], quant: Mapping[str, Any]) -> list[str]:
    """One fault line for each setting that is switched on but has no place here."""
    faults = []
    for table, values in ((REFUSED, extras), (REFUSED_QUANT, quant)):
        for name, (off_values, instead) in table.items():
            value = values.get(name)
            if value is not None and not any(
                value is off or (value == off and value is not True) for off in off_values
            ):
                shown = f'"{value}"' if isinstance(value, str) else str(value).lower()
                faults.append(
                    f"{name} is {shown}, which this version does not have: {instead}, and remove {name}"
                )
    return faults


def list_ignored(extras: Mapping[str, Any]) -> list[str]:
    """One line for each setting that was given, does nothing here, and might be missed."""
    return [
        f"{name} has no effect here: {reason}"
        for name, reason in WITHOUT_EFFECT.items()
        if extras.get(name) not in (None, False, "") and reason != _BELONGS_TO_OFF_SWITCH
    ]
