"""Fine-tunes a generative language model from a JSON argument file.

python finetune_generation.py ./llama/lora_argument.json [--key value ...]
python finetune_generation.py --help
"""

import sys
from contextlib import ExitStack

from finetune.machine.environment import check_environment
from finetune.machine.processor import configure_processor
from finetune.machine.quiet import silence_libraries
from finetune.processes.command import run_command
from finetune.settings.arguments import parse_arguments


def main() -> None:
    """Parses, loads, adapts, trains, evaluates and saves."""
    args = parse_arguments()
    check_environment()
    processor_note = configure_processor() if args.training.device == "cpu" else None

    from finetune.machine.half_precision import half_precision_on_cpu
    from finetune.models.resolve import resolve_model
    from finetune.processes.phases import PhaseRecord
    from finetune.run.data import check_positions, find_files, read_data
    from finetune.run.directory import open_run_directory
    from finetune.run.final_weights import save_final_weights
    from finetune.run.model import adapt, load_base_model
    from finetune.run.preview.preview import show
    from finetune.run.processes import plan_layout, start_processes
    from finetune.run.report import Report
    from finetune.run.tokenizer import load_tokenizer_pair, vocabulary_notes
    from finetune.run.trainer import build_trainer
    from finetune.run.training_arguments import schedule_notes

    resolved = resolve_model(str(args.model.model_name_or_path), needs_weights=not args.data.preview)
    layout = plan_layout(args, resolved)
    files = find_files(args)
    if args.data.preview:
        return show(args, resolved, files)
    phases = PhaseRecord()
    with ExitStack() as stack:
        groups = stack.enter_context(start_processes(args, layout, phases))
        run = stack.enter_context(open_run_directory(args, groups))
        report = Report(args, run, processor_note)
        if run.finished:
            report.nothing_to_do()
            return
        silence_libraries()
        if args.model.rehearse_half_precision:
            stack.enter_context(half_precision_on_cpu())
        pair = load_tokenizer_pair(args, resolved)
        report.notes(vocabulary_notes(args, resolved, pair, layout))
        phases.enter("reading data")
        data = read_data(args, files, pair)
        report.data(data)
        check_positions(data, args.data, resolved)
        phases.enter("loading weights")
        base, stage = load_base_model(args, resolved, pair, groups)
        model = adapt(base, args, resolved)
        trainer = build_trainer(
            args, run, model, data, pair, resolved=resolved, groups=groups, stage=stage, phases=phases
        )
        report.model(trainer.parallel)
        if args.training.do_train:
            report.notes(list(schedule_notes(args, trainer.plan_steps())))

        metrics: dict[str, float] = {}
        if args.training.do_train:
            metrics |= trainer.train(run.resume)
            save_final_weights(run, trainer)
        if args.training.do_eval:
            metrics |= trainer.evaluate()
        report.results(trainer, metrics)


if __name__ == "__main__":
    sys.exit(run_command(main))
