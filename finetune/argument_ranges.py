"""The numbers each setting may hold."""

import math

# name -> (lowest, highest, lowest itself allowed, highest itself allowed)
_AT_LEAST_ONE = (1, math.inf, True, False)
_AT_LEAST_ZERO = (0, math.inf, True, False)
_ABOVE_ZERO = (0, math.inf, False, False)
_DEGREE = (-1, math.inf, True, False)
_SHARE_BELOW_ONE = (0, 1, True, False)
RANGES: dict[str, tuple[float, float, bool, bool]] = {
    "lora_rank": _AT_LEAST_ONE,
    "lora_alpha": _ABOVE_ZERO,
    "lora_dropout": _SHARE_BELOW_ONE,
    "lora_plus_scale": _ABOVE_ZERO,
    "num_prefix_tokens": _AT_LEAST_ONE,
    "neftune_noise_alpha": _ABOVE_ZERO,
    "hidden_dropout_prob": _SHARE_BELOW_ONE,
    "attention_probs_dropout_prob": _SHARE_BELOW_ONE,
    "pp_recompute_interval": _AT_LEAST_ZERO,
    "virtual_pp_degree": _AT_LEAST_ONE,
    "hang_timeout": _AT_LEAST_ZERO,
    "max_skipped_steps": _AT_LEAST_ONE,
    "replica_check_steps": _AT_LEAST_ZERO,
    "src_length": _AT_LEAST_ONE,
    "max_length": (2, math.inf, True, False),
    "validation_split": _ABOVE_ZERO,
    "max_train_samples": _AT_LEAST_ONE,
    "max_eval_samples": _AT_LEAST_ONE,
    "self_cognition_samples": _AT_LEAST_ZERO,
    "shuffle_buffer_size": _AT_LEAST_ONE,
    "preview": _AT_LEAST_ZERO,
    "pad_to_multiple_of": _AT_LEAST_ONE,
    "max_new_tokens": _AT_LEAST_ONE,
    "top_k": _AT_LEAST_ZERO,
    "top_p": (0, 1, False, True),
    "temperature": _ABOVE_ZERO,
    "per_device_train_batch_size": _AT_LEAST_ONE,
    "per_device_eval_batch_size": _AT_LEAST_ONE,
    "gradient_accumulation_steps": _AT_LEAST_ONE,
    "eval_accumulation_steps": _AT_LEAST_ONE,
    "learning_rate": _AT_LEAST_ZERO,
    "weight_decay": _AT_LEAST_ZERO,
    "adam_beta1": _SHARE_BELOW_ONE,
    "adam_beta2": _SHARE_BELOW_ONE,
    "adam_epsilon": _ABOVE_ZERO,
    "max_grad_norm": _AT_LEAST_ZERO,
    "num_train_epochs": _ABOVE_ZERO,
    "max_steps": (-1, math.inf, True, False),
    "warmup_ratio": (0, 1, True, True),
    "warmup_steps": _AT_LEAST_ZERO,
    "num_cycles": _ABOVE_ZERO,
    "lr_end": _AT_LEAST_ZERO,
    "power": _ABOVE_ZERO,
    "logging_steps": _AT_LEAST_ONE,
    "save_steps": _AT_LEAST_ONE,
    "eval_steps": _AT_LEAST_ZERO,
    "save_total_limit": _AT_LEAST_ZERO,
    "seed": (0, 2**32 - 1, True, True),
    "scale_loss": _ABOVE_ZERO,
    "max_evaluate_steps": (-1, math.inf, True, False),
    "dataloader_num_workers": _AT_LEAST_ZERO,
    "ordered_save_group_size": _AT_LEAST_ZERO,
    "tensor_parallel_degree": _DEGREE,
    "pipeline_parallel_degree": _DEGREE,
    "sharding_parallel_degree": _DEGREE,
    "sep_parallel_degree": _DEGREE,
    "context_parallel_degree": _DEGREE,
    "expert_parallel_degree": _DEGREE,
    "expert_tensor_parallel_degree": _DEGREE,
}


def find_range_fault(name: str, value: float | None) -> str | None:
    """Why the number cannot be used, as one line; None when it can, or when it is null."""
    low, high, low_allowed, high_allowed = RANGES[name]
    if value is None:
        return None
    if (value > low or (low_allowed and value == low)) and (value < high or (high_allowed and value == high)):
        return None
    if high == math.inf:
        allowed = f"at least {low}" if low_allowed else f"more than {low}"
    else:
        start = f"from {low}" if low_allowed else f"above {low}"
        allowed = f"{start} up to {high}" if high_allowed else f"{start} to below {high}"
    return f"{name} is {value}: it must be {allowed}"
