"""Answers to the lines of a file, or on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.machine.device import device_kind
from finetune.machine.environment import check_machine
from finetune.machine.processor import configure_processor
from finetune.serving.predict.run import parse_options, predict


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, checks, answers."""
    options = parse_options(argv)
    check_machine()
    options.check()
    if device_kind(options.model.device) == "cpu":
        configure_processor()
    predict(options)
