"""What a run tells and leaves behind: first lines, final weights, results, curve, last lines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.checkpoints.folder import list_checkpoints
from finetune.machine.command_names import MERGE_LORA, PREDICT, TRAIN, next_command
from finetune.machine.screen import show_line
from finetune.processes.launch import is_first_process
from finetune.processes.topology import describe_layout
from finetune.reporting.report import print_summary, write_generations, write_results
from finetune.run.aistudio import upload
from finetune.run.alignment import gives_rewards
from finetune.run.directory import RESULTS_FILE
from finetune.settings.data import default_new_tokens
from finetune.storage.files import read_json_or_empty

if TYPE_CHECKING:
    from finetune.parallel.parallel_model import ParallelModel
    from finetune.run.data import RunData
    from finetune.run.directory import RunDirectory
    from finetune.settings.arguments import Arguments
    from finetune.training.trainer import FinetuneTrainer

GENERATIONS_FILE = "generated_output.json"
LOG_FILE = "train_log.jsonl"
PLOT_FILE = "loss.png"
_NUM_SHOWN_SAMPLES = 3


class Report:
    """Says on the screen what a run does, and writes its results.

    Args:
        args: The arguments of the run.
        run: Its output folder.
        processor_note: The line about CPU settings, shown where FINETUNE_VERBOSE is 1; or None.
    """

    def __init__(self, args: Arguments, run: RunDirectory, processor_note: str | None):
        self.args = args
        self.run = run
        for line in (*args.warnings, *run.warnings):
            self.show_message(f"warning: {line}")
        if processor_note and os.environ.get("FINETUNE_VERBOSE") == "1":
            self.show_message(processor_note)
        if run.resume:
            self.show_message(f"Continuing from {run.resume}")

    def show_message(self, text: str) -> None:
        """One line for the person, from the first process only."""
        if is_first_process():
            show_line(text)

    def notes(self, lines: list[str]) -> None:
        """Says what a preparing step found."""
        for line in lines:
            self.show_message(line)

    def data(self, data: RunData) -> None:
        """Shows the counts of the data files' lines."""
        for split, report in data.reports.items():
            self.show_message(f"Data, {split}: {report.describe()}")
        left = self.args.data.max_length - self.args.data.src_length
        most = default_new_tokens(self.args.data)
        is_bounded = self.args.generation.max_new_tokens is None and most < left
        if data.prompts and is_bounded:
            self.show_message(
                f"Generated texts end after {most} tokens, though max_length leaves room for {left}: set "
                "max_new_tokens for longer ones"
            )

    def nothing_to_do(self) -> None:
        """Says that this very run is finished."""
        self.show_message(
            f"{self.run.path} holds this run, finished. Give larger max_steps or num_train_epochs to train further, "
            "or --overwrite_output_dir true to train it anew."
        )

    def only_end_is_missing(self) -> None:
        """Says that nothing is left to train."""
        self.show_message(
            f"{self.run.path} holds the final weights of this run; what follows the training is completed"
        )

    def model(self, parallel: ParallelModel) -> None:
        """Says how large the model is, how much of it is trained, and how it is laid out over the processes."""
        layout = parallel.groups.layout
        total, trained, held = parallel.count_parameters()
        if self.args.training.do_train:
            self.show_message(
                f"Model: {total:,} parameters, {trained:,} of them trained ({trained / total:.2%})"
            )
        if layout.world > 1:
            updated = parallel.count_updated() if layout.sharding > 1 else None
            self.show_message(describe_layout(layout, held, updated))
            engines = parallel.engines
            self.show_message("\n".join(f"  {axis}: {engine}" for axis, engine in engines.items()))
            if parallel.groups.is_first and self.args.training.do_train and not self.run.trained:
                self.run.note_engines(engines)

    def results(self, trainer: FinetuneTrainer, metrics: dict[str, Any]) -> None:
        """Writes results, generated texts and the curve, and prints the last lines."""
        trainer.training_log.close()
        if not trainer.groups.is_first:
            return
        files = {"results": self.run.path / RESULTS_FILE}
        # A command that only evaluates adds to what the training wrote.
        known = {} if self.args.training.do_train else read_json_or_empty(files["results"])
        write_results(files["results"], known | metrics)
        rows = getattr(trainer.evaluation, "generations", [])
        if rows and self.args.data.save_generation_output:
            files["generated texts"] = self.run.path / GENERATIONS_FILE
            write_generations(files["generated texts"], rows)
        if self.args.training.do_train:
            files |= self._training_files()
        title = "Trained" if self.args.training.do_train else "Evaluated"
        if is_first_process():
            print_summary(
                f"{title} {self.args.model.model_name_or_path}",
                metrics={name: value for name, value in metrics.items() if not name.startswith("train_num")},
                samples=rows[:_NUM_SHOWN_SAMPLES],
                files=files,
                next_commands=self._next_commands(),
            )
        if self.args.model.save_to_aistudio and self.args.training.do_train:
            upload(self.run.path, self.args.model, self.show_message)
        if self.args.training.do_train:
            self.run.finish()

    def _training_files(self) -> dict[str, Path]:
        from finetune.reporting.plot import plot_losses

        path = self.run.path
        plot_losses(path / LOG_FILE, path / PLOT_FILE)
        files = {"weights": path, "log": path / LOG_FILE, "loss curve": path / PLOT_FILE}
        checkpoints = list_checkpoints(path)
        return files | ({"last checkpoint": checkpoints[-1]} if checkpoints else {})

    def _next_commands(self) -> dict[str, str]:
        if not self.args.training.do_train or self.args.data.eval_with_do_generation:
            return {}
        out = str(self.run.path)
        if self.args.alignment.loss_type is not None:  # its data have no single answer to compare with
            return self._use_commands(out)
        options = {"do_train": "false", "do_eval": "true", "eval_with_do_generation": "true",
                   "save_generation_output": "true"}  # fmt: skip
        if self.args.model.lora:
            options["lora_path"] = out
        elif self.args.model.prefix_tuning:
            options["prefix_path"] = out
        else:
            options["model_name_or_path"] = out
        options |= self._options_of_one_process()
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return {
            "evaluate by generated text": next_command(TRAIN, [f"{out}/arguments.json", *words]),
            **self._use_commands(out),
        }

    def _options_of_one_process(self) -> dict[str, str]:
        """What one process must be told to run with the settings of this run, which may have had several."""
        names = ("tensor_parallel_degree", "pipeline_parallel_degree", "sharding_parallel_degree")
        degrees = {name: getattr(self.args.training, name) for name in names}
        degrees["virtual_pp_degree"] = self.args.model.virtual_pp_degree
        options = {name: "1" for name, degree in degrees.items() if degree > 1}
        if self.args.training.sequence_parallel:
            options["sequence_parallel"] = "false"
        return options

    def _use_commands(self, out: str) -> dict[str, str]:
        """How to talk with what was trained, and how to make one model of an adapter."""
        model = self.args.model
        talk, use = ["--model_name_or_path"], "talk with it"
        if gives_rewards(self.args):
            files = ["--data_file", "answers.jsonl", "--output_file", "rewards.jsonl"]
            talk, use = [*files, "--model_name_or_path"], "score the answers of a file"
        if not (model.lora or model.prefix_tuning):
            return {use: next_command(PREDICT, [*talk, out])}
        option = "--lora_path" if model.lora else "--prefix_path"
        commands = {use: next_command(PREDICT, [*talk, str(model.model_name_or_path), option, out])}
        if model.lora:
            merge = ["--lora_path", out, "--merge_model_path", f"{out}-merged"]
            base = ["--model_name_or_path", str(model.model_name_or_path)]
            commands["merge it into its base"] = next_command(MERGE_LORA, [*merge, *base])
        return commands
