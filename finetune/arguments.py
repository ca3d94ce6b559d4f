"""What a run was asked to do: the argument file and command line, checked and resolved.

    args = parse_arguments(["llama/sft_argument.json", "--max_steps", "2"])
    args.model.lora, args.data.max_length, args.training.learning_rate

Nothing here imports paddle: help and every argument error answer at once.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any

from finetune.argument_checks import Values, find_faults
from finetune.argument_groups import (
    MODEL_CONFIG_SETTINGS,
    DataArguments,
    GenerationArguments,
    ModelArguments,
    QuantArguments,
)
from finetune.argument_parsing import read_given
from finetune.argument_refusals import PARALLEL_WORDS
from finetune.argument_resolution import adapt_to_device, resolve
from finetune.argument_settings import CHANGED_DEFAULTS, known_settings
from finetune.errors import UserError
from finetune.parallel.topology import Layout

__all__ = [
    "Arguments",
    "DataArguments",
    "GenerationArguments",
    "ModelArguments",
    "QuantArguments",
    "TrainingSettings",
    "parse_arguments",
]

# Kept out of every file that is written.
SECRETS = frozenset({"aistudio_token", "wandb_api_key"})

# Resolved here, so PaddleNLP's TrainingArguments must be told even when the user did not say.
_RESOLVED_TRAINING = (
    *CHANGED_DEFAULTS,
    "output_dir",
    "do_eval",
    "eval_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
)

_ONE_PROCESS = Layout()

# From the training group into the model's configuration.
_CONFIG_SETTINGS_OF_TRAINING = (
    "recompute",
    "refined_recompute",
    "sequence_parallel",
    "fuse_sequence_parallel_allreduce",
)
# Parallelism is this project's own (finetune.parallel), so PaddleNLP's trainer must not set up any.
_OWN_PARALLELISM = frozenset(
    {
        "tensor_parallel_degree",
        "pipeline_parallel_degree",
        "sep_parallel_degree",
        "context_parallel_degree",
        "expert_parallel_degree",
        "expert_tensor_parallel_degree",
        "use_expert_parallel",
        "sequence_parallel",
        "fuse_sequence_parallel_allreduce",
        "hybrid_parallel_topo_order",
        "sharding",
        "sharding_parallel_degree",
        "sharding_parallel_mesh_dimension",
        "sharding_comm_buffer_size_MB",
        "save_sharded_model",
        "load_sharded_model",
        "unified_checkpoint",
        *PARALLEL_WORDS,
    }
)


class TrainingSettings(SimpleNamespace):
    """Every field of PaddleNLP's TrainingArguments as an attribute, with its resolved value.

    ``finetune/training_arguments.json`` lists them.
    """


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """All settings of one run.

    Attributes:
        model: Weights, method (LoRA, prefix tuning) and model options.
        data: Data and row lengths.
        generation: How text is generated.
        quant: Quantisation switches; all off in this version.
        training: PaddleNLP's TrainingArguments.
        given: Names that the file or the command line set (null does not count).
        warnings: Lines to show before the run starts.
    """

    model: ModelArguments
    data: DataArguments
    generation: GenerationArguments
    quant: QuantArguments
    training: TrainingSettings
    given: frozenset[str]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Every setting by name, as an argument file that parses to the same values; tokens and keys left out."""
        groups = (self.model, self.data, self.generation, self.quant)
        settings = {name: value for group in groups for name, value in asdict(group).items()}
        settings.update(vars(self.training))
        return {
            name: value
            for name, value in settings.items()
            if name not in SECRETS and name in known_settings()
        }

    def training_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for PaddleNLP's TrainingArguments: what was given, and what was resolved here.

        ``do_eval`` is left out when there is no evaluation during training: PaddleNLP would then evaluate
        every ``logging_steps``, while here it means once at the end. Read ``training.do_eval`` for that.
        Settings of parallelism are left out, too: `finetune.parallel` acts on them, not PaddleNLP's trainer.
        """
        names = (self.given & vars(self.training).keys()) | set(_RESOLVED_TRAINING)
        names -= _OWN_PARALLELISM
        kwargs = {name: getattr(self.training, name) for name in names}
        if self.training.evaluation_strategy == "no":
            kwargs.pop("do_eval")
        return {name: value for name, value in kwargs.items() if value is not None}

    def model_config_kwargs(self, layout: Layout = _ONE_PROCESS, rank: int = 0) -> dict[str, Any]:
        """Options for the model's configuration (fused kernels, recompute, slices); null ones are left out.

        A pipeline stage is built as an ordinary model with fewer layers, so the configuration never
        hears of a pipeline.

        Args:
            layout: How the processes are laid out.
            rank: This process's global rank.
        """
        kwargs = {name: getattr(self.model, name) for name in MODEL_CONFIG_SETTINGS}
        kwargs.update({name: getattr(self.training, name) for name in _CONFIG_SETTINGS_OF_TRAINING})
        sliced = layout.tensor > 1
        kwargs.update(
            tensor_parallel_degree=layout.tensor,
            tensor_parallel_rank=layout.coordinates(rank).tensor,
            # The loss is computed on the slices of the logits, which saves the memory of the whole ones.
            tensor_parallel_output=sliced,
            sequence_parallel=sliced and self.training.sequence_parallel,
            pipeline_parallel_degree=1,
            virtual_pp_degree=1,
            sep_parallel_degree=1,
            context_parallel_degree=1,
        )
        return {name: value for name, value in kwargs.items() if value is not None}


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Read ``ARGS.json --key value ...``, check it, and fill in what follows from other settings.

    Args:
        argv: The words after the program's name; null takes those of this process.

    Raises:
        UserError: With every fault found, one line each.
        SystemExit: With code 0 after ``--help`` or ``--help-all`` was printed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if wants := _wanted_help(argv):
        from finetune.argument_help import format_help

        print(format_help(every_setting=wants == "all"))
        raise SystemExit(0)
    given = read_given(argv)
    values = {name: setting.default for name, setting in known_settings().items()}
    values.update(given.values)
    names = frozenset(given.values)
    warnings = resolve(values, names, given.extras)
    faults = given.faults
    if not given.lacks_file:  # without its file a run lacks everything, and only the file's own fault helps
        faults = faults + find_faults(Values(values, given.broken), given.extras)
    if faults:
        raise UserError(faults)
    warnings += adapt_to_device(values)
    return _build(copy.deepcopy(values), names, tuple(warnings))


def _wanted_help(argv: list[str]) -> str:
    if "--help-all" in argv or "--help_all" in argv:
        return "all"
    for flag in ("--help", "-h"):
        if flag in argv:
            return "all" if argv[argv.index(flag) + 1 :][:1] == ["all"] else "common"
    return ""


def _build(values: dict[str, Any], given: frozenset[str], warnings: tuple[str, ...]) -> Arguments:
    training = {
        name: values[name] for name, setting in known_settings().items() if setting.group == "training"
    }
    return Arguments(
        model=_fill(ModelArguments, values),
        data=_fill(DataArguments, values),
        generation=_fill(GenerationArguments, values),
        quant=_fill(QuantArguments, values),
        training=TrainingSettings(
            **training, sharding_degree=-1
        ),  # an alias, kept as PaddleNLP's class has it
        given=given,
        warnings=warnings,
    )


def _fill(group: Any, values: dict[str, Any]) -> Any:
    return group(**{field.name: values[field.name] for field in fields(group)})
