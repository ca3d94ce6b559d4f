"""A training from its first check to its last file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from finetune.machine.command_names import PREVIEW
from finetune.machine.environment import check_machine
from finetune.machine.processor import configure_processor
from finetune.machine.quiet import silence_libraries
from finetune.settings.arguments import answer_help, parse_arguments

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.run.directory import RunDirectory
    from finetune.run.report import Report
    from finetune.settings.arguments import Arguments
    from finetune.training.trainer import FinetuneTrainer

_NUM_SHOWN = 3
"""Samples of a preview whose number is not given."""


def main(argv: Sequence[str] | None = None, *, overrides: Mapping[str, Any] | None = None) -> None:
    """Reads the settings, trains, evaluates and saves.

    Args:
        argv: The words after the command's name; None takes those of this process.
        overrides: Settings of a call from Python, over these.
    """
    args = parse_arguments(argv, overrides=overrides)
    check_machine()
    run(args, configure_processor() if args.training.device == "cpu" else None)


def run(args: Arguments, processor_note: str | None) -> None:
    """Runs what the settings ask for: a training, an evaluation, a preview or a trial."""
    from finetune.run.trial import as_trial

    if not args.data.longest_first:
        return _run(args, processor_note)
    with as_trial(args) as trial:
        return _run(trial, processor_note)


def _run(args: Arguments, processor_note: str | None) -> None:
    """Loads, adapts, trains, evaluates and saves; the note says what was set for the processor."""
    from finetune.machine.half_precision import half_precision_on_cpu
    from finetune.models.resolve import resolve_model
    from finetune.processes.phases import PhaseRecord
    from finetune.run.adapter import adapt
    from finetune.run.alignment import comparison_of, gives_rewards
    from finetune.run.data import check_positions, find_files, read_data
    from finetune.run.directory import open_run_directory
    from finetune.run.model import load_base_model
    from finetune.run.preview.preview import show
    from finetune.run.processes import plan_layout, start_processes
    from finetune.run.reference import find_reference
    from finetune.run.report import Report
    from finetune.run.start_model import check_start
    from finetune.run.template_day import use_day
    from finetune.run.tokenizer import load_tokenizer_pair, vocabulary_notes
    from finetune.run.trainer import build_trainer

    resolved = resolve_model(
        str(args.model.model_name_or_path),
        needs_weights=not args.data.preview,
        text_only=args.model.text_only,
    )
    resolved, start_notes = check_start(args, resolved)
    layout = plan_layout(args, resolved)
    files = find_files(args)
    if args.data.preview:
        return show(args, resolved, files)
    reference = find_reference(args, resolved)
    phases = PhaseRecord()
    with ExitStack() as stack:
        groups = stack.enter_context(start_processes(args, layout, phases))
        directory = stack.enter_context(open_run_directory(args, groups))
        report = Report(args, directory, processor_note)
        if directory.finished:
            report.nothing_to_do()
            return
        silence_libraries()
        if args.model.rehearse_half_precision:
            stack.enter_context(half_precision_on_cpu())
        pair = load_tokenizer_pair(args, resolved)
        report.notes([*start_notes, *use_day(directory), *vocabulary_notes(args, resolved, pair, layout)])
        phases.enter("reading data")
        data = read_data(args, files, pair)
        report.data(data)
        check_positions(data, args.data, resolved, comparison_of(args), reads_ends=gives_rewards(args))
        report.notes(reference.describe())
        reference.ask_other(directory, data, pair, groups=groups, phases=phases)
        phases.enter("loading weights")
        base, stage = load_base_model(args, resolved, pair, groups)
        model = adapt(base, args, resolved, groups)
        trainer = build_trainer(
            args, directory, model, data, pair, resolved=resolved, groups=groups, stage=stage, phases=phases
        )
        report.model(trainer.parallel)
        report.notes(reference.add(directory, trainer))
        _work(args, directory, trainer, report, resolved.folder)


def _work(
    args: Arguments, run: RunDirectory, trainer: FinetuneTrainer, report: Report, base_folder: Path | None
) -> None:
    """Trains, evaluates and tells the results, or only tries steps."""
    from finetune.run.trial import run_trial

    if args.data.longest_first:
        return run_trial(trainer, report)
    metrics = train(args, run, trainer, report, base_folder) if args.training.do_train else {}
    metrics |= trainer.evaluate() if args.training.do_eval else {}
    return report.results(trainer, metrics)


def train(
    args: Arguments, run: RunDirectory, trainer: FinetuneTrainer, report: Report, base_folder: Path | None
) -> dict[str, float]:
    """Trains and puts the result into the output folder, unless it stands there already; the metrics of the training."""
    from finetune.run.base_weights import compare_base
    from finetune.run.disk_space import disk_notes
    from finetune.run.final_weights import save_final_weights, take_up_final_weights
    from finetune.run.training_arguments import schedule_notes

    report.notes(list(schedule_notes(args, trainer.plan_steps())))
    if base_folder is not None and trainer.groups.is_first and (args.model.lora or args.model.prefix_tuning):
        report.notes(compare_base(run, base_folder))
    if run.trained:
        report.only_end_is_missing()
        return take_up_final_weights(run, trainer)
    report.notes(disk_notes(args, run, trainer))
    metrics = trainer.train(run.resume)
    save_final_weights(run, trainer, metrics, base=base_folder)
    return metrics


def preview(argv: Sequence[str] | None = None) -> None:
    """Shows what a run would train on, instead of training: `_NUM_SHOWN` samples, or as many as `--preview` says.

    Args:
        argv: As for `main`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    answer_help(words, PREVIEW)
    is_counted = any(word.split("=")[0] == "--preview" for word in words)
    main(words if is_counted else [*words, "--preview", str(_NUM_SHOWN)])
