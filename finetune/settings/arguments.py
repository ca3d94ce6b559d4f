"""What a run was asked to do: the argument file and command line, checked and resolved.

    args = parse_arguments(["llama/sft_argument.json", "--max_steps", "2"])
    args.model.lora, args.data.max_length, args.training.learning_rate

Nothing here imports paddle: help and every argument error answer at once.
"""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from finetune.errors import UserError
from finetune.machine.command_names import TRAIN
from finetune.processes.layout import Layout
from finetune.settings.alignment import AlignmentArguments, infer_loss_type
from finetune.settings.checks import find_faults
from finetune.settings.data import DataArguments, GenerationArguments
from finetune.settings.help import format_help, format_matches
from finetune.settings.model import ModelArguments, QuantArguments
from finetune.settings.parsing import read_given
from finetune.settings.records import MODEL_CONFIG, PADDLENLP, Setting
from finetune.settings.registry import GROUPS, known_settings
from finetune.settings.resolution import adapt_to_device, resolve

_ONE_PROCESS = Layout()


class TrainingSettings(SimpleNamespace):
    """Every field of PaddleNLP's TrainingArguments as an attribute, with its resolved value.

    ``finetune/settings/training_arguments.json`` lists them.
    """


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """All settings of one run.

    Attributes:
        model: Weights, method (LoRA, prefix tuning) and model options.
        data: Data and row lengths.
        alignment: The loss of preference data.
        generation: How text is generated.
        quant: Switches of quantisation after training; all off in this version.
        training: PaddleNLP's TrainingArguments.
        given: Names that the file or the command line set (null does not count).
        warnings: Lines to show before the run starts.
    """

    model: ModelArguments
    data: DataArguments
    alignment: AlignmentArguments
    generation: GenerationArguments
    quant: QuantArguments
    training: TrainingSettings
    given: frozenset[str]
    warnings: tuple[str, ...]

    def _items(self) -> Iterator[tuple[Setting, Any]]:
        for setting in known_settings().values():
            yield setting, getattr(getattr(self, setting.group), setting.name)

    def to_json(self) -> dict[str, Any]:
        """Every setting by name, as an argument file that parses to the same values; tokens and keys left out."""
        return {
            setting.name: copy.deepcopy(value) for setting, value in self._items() if not setting.is_secret
        }

    def training_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for PaddleNLP's TrainingArguments: what was given, and what was resolved here.

        ``do_eval`` is left out when there is no evaluation during training: PaddleNLP would then evaluate
        every ``logging_steps``, while here it means once at the end. Read ``training.do_eval`` for that.
        Settings of parallelism are left out, too: `finetune.parallel` acts on them, not PaddleNLP's trainer.
        """
        kwargs = {
            setting.name: value
            for setting, value in self._items()
            if PADDLENLP in setting.readers and (setting.is_resolved or setting.name in self.given)
        }
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
        kwargs = {setting.name: value for setting, value in self._items() if MODEL_CONFIG in setting.readers}
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


def parse_arguments(
    argv: Sequence[str] | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    is_elsewhere: bool = False,
) -> Arguments:
    """Reads ``ARGS.json --key value ...``, checks it, and fills in what follows from other settings.

    Args:
        argv: The words after the program's name; null takes those of this process.
        overrides: Values as an argument file has them, given in a call from Python; they win.
        is_elsewhere: Whether the run is to be on another machine, and this one need not have its device.

    Raises:
        UserError: With every fault found, one line each.
        SystemExit: With code 0 after ``--help``, ``--help WORD`` or ``--help-all`` was printed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    answer_help(argv)
    given = read_given(argv, overrides or {})
    values = {name: setting.default for name, setting in known_settings().items()} | given.values
    names = frozenset(given.values)
    warnings = infer_loss_type(values, names, given.raw, given.file_name)
    warnings += resolve(values, names, given.foreign)
    faults = given.faults
    if not (
        given.lacks_file or given.is_other_method
    ):  # without its file a run lacks everything, and only the file's own fault helps
        faults = faults + find_faults(values, given.broken, given.foreign, is_elsewhere=is_elsewhere)
    if faults:
        raise UserError(faults)
    if given.translated:
        warnings.insert(0, f"names of other tools are read: {'; '.join(given.translated.values())}")
    warnings += adapt_to_device(values)
    return _build(copy.deepcopy(values), names, tuple(warnings))


def answer_help(argv: Sequence[str], command: str = TRAIN) -> None:
    """Prints the help where the words ask for it.

    Args:
        argv: The words after the command's name.
        command: What it is.

    Raises:
        SystemExit: With code 0 after it was printed.
        UserError: No setting has the word that is looked for.
    """
    wants_all = not {"--help-all", "--help_all"}.isdisjoint(argv)
    if flags := [flag for flag in ("--help", "-h") if flag in argv]:
        following = argv[argv.index(flags[0]) + 1 :][:1]
        wants_all = wants_all or following == ["all"]
        if (
            following
            and not wants_all
            and not following[0].startswith("-")
            and not following[0].endswith((".json", ".yaml", ".yml"))
        ):
            print(format_matches(following[0]))
            raise SystemExit(0)
    if wants_all or flags:
        print(format_help(every_setting=wants_all, command=command))
        raise SystemExit(0)


def _build(values: dict[str, Any], given: frozenset[str], warnings: tuple[str, ...]) -> Arguments:
    members: dict[str, dict[str, Any]] = {}
    for name, setting in known_settings().items():
        members.setdefault(setting.group, {})[name] = values[name]
    groups: dict[str, Any] = {group: build(**members[group]) for group, build in GROUPS.items()}
    # An alias, kept as PaddleNLP's class has it.
    groups["training"] = TrainingSettings(**members["training"], sharding_degree=-1)
    return Arguments(**groups, given=given, warnings=warnings)
