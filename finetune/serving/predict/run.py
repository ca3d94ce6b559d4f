"""The command line of predict_generation.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.machine.command_names import PREDICT, usage_name
from finetune.machine.command_parser import CommandParser
from finetune.machine.screen import print_text
from finetune.serving.decoding.options import (
    ModelOptions,
    add_decoding_options,
    add_model_options,
    decoding_settings,
    model_options,
)
from finetune.serving.decoding.settings import DecodingSettings

if TYPE_CHECKING:
    from finetune.serving.predict.loading import PlannedModel


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What to answer, with which model.

    Attributes:
        model: The model.
        settings: How to generate.
        data_file: Lines to answer; None talks on the terminal.
        output_file: Where the answers go.
        batch_size: Prompts that are generated together.
    """

    model: ModelOptions
    settings: DecodingSettings
    data_file: Path | None = None
    output_file: Path | None = None
    batch_size: int = 8

    def check(self) -> None:
        """Says what is wrong with the options about files.

        Raises:
            UserError: One of the two files without the other, or a batch of nothing.
        """
        faults = []
        if (self.data_file is None) != (self.output_file is None):
            given, lacking = ("data_file", "output_file") if self.data_file else ("output_file", "data_file")
            faults.append(
                f"{given} is given without {lacking}: add --{lacking}, or give neither to talk here"
            )
        if self.batch_size < 1:
            faults.append(f"batch_size is {self.batch_size} but must be at least 1: raise --batch_size")
        if faults:
            raise UserError(faults)


def parse_options(argv: Sequence[str] | None = None) -> PredictOptions:
    """Reads the command line; exits with 2 and the usage where it cannot be read.

    Raises:
        UserError: A value is out of range.
    """
    parser = CommandParser(
        prog=usage_name(PREDICT),
        description="Answer the lines of a file, or talk with a model on the terminal.",
    )
    group = parser.add_argument_group("files (leave both out to talk on the terminal)")
    group.add_argument(
        "--data_file",
        type=Path,
        help="prompts: jsonl, json or csv in any format of training data; for a reward model, answers",
    )
    group.add_argument(
        "--output_file", type=Path, help="one JSON object per line of the input, in its order, with output"
    )
    group.add_argument("--batch_size", type=int, default=8, help="prompts generated together (8)")
    add_model_options(parser)
    add_decoding_options(parser)
    values = vars(parser.parse_args(argv))
    return PredictOptions(
        model=model_options(values),
        settings=decoding_settings(values),
        data_file=values["data_file"],
        output_file=values["output_file"],
        batch_size=values["batch_size"],
    )


def predict(options: PredictOptions) -> None:
    """Checks, loads, answers.

    Raises:
        UserError: Model, data or files cannot be used as given.
    """
    from finetune.machine.quiet import silence_libraries
    from finetune.models.reward_head import is_reward_config
    from finetune.serving.predict.journal import Journal, check_output
    from finetune.serving.predict.loading import load_responder, plan_model
    from finetune.serving.predict.responder import check_room

    plan = plan_model(options.model, takes_rewards=options.data_file is not None)
    if is_reward_config(plan.resolved.config):
        _score(options, plan)
        return
    check_room(plan.position_limit, options.settings)
    if options.data_file is None or options.output_file is None:
        silence_libraries()
        print_text(*plan.notes, stream=sys.stderr)
        from finetune.serving.predict.interactive import converse

        converse(load_responder(plan), options.settings)
        return
    from finetune.serving.predict.batch_run import describe_run, run_batches
    from finetune.serving.predict.requests import read_requests

    check_output(options.output_file)
    requests = read_requests(options.data_file)
    with Journal(options.output_file, describe_run(plan, options.settings, options.data_file)) as journal:
        silence_libraries()
        print_text(*plan.notes, stream=sys.stderr)
        responder = load_responder(plan)
        run_batches(responder, requests, options.settings, journal, batch_size=options.batch_size)


def _score(options: PredictOptions, plan: PlannedModel) -> None:
    """Writes the rewards of the answers in a file."""
    from finetune.machine.quiet import silence_libraries
    from finetune.serving.predict.batch_run import describe_run
    from finetune.serving.predict.journal import Journal, check_output
    from finetune.serving.predict.loading import load_scorer
    from finetune.serving.predict.scored_rows import read_rows
    from finetune.serving.predict.scoring import score_rows

    assert options.data_file is not None and options.output_file is not None, "`check` wants both or neither"
    check_output(options.output_file)
    rows = read_rows(options.data_file)
    with Journal(options.output_file, describe_run(plan, options.settings, options.data_file)) as journal:
        silence_libraries()
        print_text(*plan.notes, stream=sys.stderr)
        score_rows(load_scorer(plan), rows, journal, batch_size=options.batch_size)
