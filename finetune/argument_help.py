"""The text of ``--help``: settings by group with their defaults, in 80 columns."""

import json
import textwrap

from finetune.argument_settings import Setting, known_settings

_WIDTH = 80
_KEY_WIDTH = 34
_USAGE = """\
usage: finetune_generation.py ARGS.json [--key value ...]
       finetune_generation.py --key value [--key=value ...]

Fine-tune a generative language model. Settings come from a JSON file, from the
command line, or both; the command line wins. A flag needs no value (--do_train
is true; true/false, yes/no, on/off and 1/0 are understood), a list takes
several words, null stands for the default. Defaults are in brackets."""
_TITLES = {
    "model": "Model and method",
    "data": "Data",
    "training": "Training (PaddleNLP's TrainingArguments)",
    "generation": "Generation",
    "quant": "Quantisation",
}

# The training settings that --help shows, in this order; --help-all shows these first.
COMMON_TRAINING = (
    *("output_dir", "do_train", "do_eval", "do_predict", "device", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *(
        "fp16",
        "bf16",
        "fp16_opt_level",
        "recompute",
        "seed",
        "logging_steps",
        "evaluation_strategy",
        "eval_steps",
    ),
    *("save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model"),
    *(
        "resume_from_checkpoint",
        "overwrite_output_dir",
        "report_to",
        "disable_tqdm",
        "eval_accumulation_steps",
    ),
    *("tensor_parallel_degree", "pipeline_parallel_degree", "sequence_parallel", "sharding"),
    *("sharding_parallel_degree", "unified_checkpoint"),
)
# Of our own groups, what few people set.
_RARE = (
    *("use_fused_linear", "use_fused_dropout_add", "no_recompute_layers", "pp_recompute_interval"),
    *("recompute_use_reentrant", "offload_recompute_inputs", "virtual_pp_degree", "tensor_parallel_output"),
    *("hang_timeout", "replica_check_steps", "deterministic"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
)


def format_help(*, every_setting: bool) -> str:
    """The help text: everything, or what is commonly set."""
    settings = known_settings()
    common = [settings[name] for name in COMMON_TRAINING]
    blocks = [_USAGE]
    for group, title in _TITLES.items():
        members = [setting for setting in settings.values() if setting.group == group]
        if group == "training":
            members = common + ([each for each in members if each not in common] if every_setting else [])
        elif not every_setting:
            members = [] if group == "quant" else [each for each in members if each.name not in _RARE]
        if members:
            blocks.append("\n".join([f"{title}:", *(_format_setting(setting) for setting in members)]))
    if not every_setting:
        blocks.append(f"--help-all shows all {len(settings)} settings.")
    return "\n\n".join(blocks)


def _format_setting(setting: Setting) -> str:
    key = f"  --{setting.name} [{_format_default(setting)}]"
    description = setting.help
    if setting.choices:
        description += f" ({', '.join(setting.choices)})"
    indent = " " * _KEY_WIDTH
    lines = textwrap.wrap(description, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    if len(key) < _KEY_WIDTH:
        lines[0] = key.ljust(_KEY_WIDTH) + lines[0].lstrip()
        return "\n".join(lines)
    return "\n".join([key, *lines])


def _format_default(setting: Setting) -> str:
    if setting.default == []:
        return "none"
    return setting.default if setting.type == "str" and setting.default else json.dumps(setting.default)
