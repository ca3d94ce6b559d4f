"""A page in the browser on which a training is put together, started, watched and tried out.

Who can use the page can start programs with the rights of who started it, and read what that person may read. So it
listens on this machine alone unless a password is given, and answers its own requests only (`finetune.serving.chat.guard`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.commands.page.controller import PASSWORD, RunController
from finetune.errors import UserError
from finetune.machine.command_names import PROGRAM, called_as
from finetune.machine.command_parser import CommandParser
from finetune.machine.device import detect_device, device_kind
from finetune.machine.environment import check_machine
from finetune.machine.processor import configure_processor
from finetune.machine.screen import print_text
from finetune.serving.chat.address import PageAddress, add_address_options, read_address, serve_app
from finetune.serving.web.listening import listen

_PORT = 7870
_STOP_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class PageOptions(PageAddress):
    """What the page shows, and where.

    Attributes:
        runs_dir: Folder of the runs.
        stops_run: Whether a run ends with the page.
    """

    runs_dir: Path
    stops_run: bool = False


def parse_options(argv: Sequence[str] | None = None) -> PageOptions:
    """Reads the command line; exits with 2 and the usage where it cannot be read."""
    parser = CommandParser(
        prog=f"{called_as() or PROGRAM} page",
        description="Prepare, start, watch and try out trainings in the browser.",
    )
    parser.add_argument(
        "--runs_dir", type=Path, default=Path("runs"), help="folder of the runs that the page starts (runs)"
    )
    parser.add_argument(
        "--stop_run_with_page",
        action="store_true",
        help="when the page ends, stop the run that is going on, too; otherwise it goes on",
    )
    add_address_options(parser.add_argument_group("page"), PASSWORD, port=_PORT)
    values = vars(parser.parse_args(argv))
    return PageOptions(
        runs_dir=values["runs_dir"], stops_run=values["stop_run_with_page"], **read_address(values, PASSWORD)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, serves the page until it is stopped, and ends the run with it where that was asked for.

    Raises:
        UserError: The options contradict each other, the port is taken, Gradio is missing, or another page has the runs.
    """
    options = parse_options(argv)
    check_machine()
    if faults := options.faults(PASSWORD):
        raise UserError(faults)
    if device_kind(detect_device(None)) == "cpu":
        configure_processor()  # for the chat; a run does it again
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    with listen(options.host, options.port) as listener:
        access = options.access_by(listener, PASSWORD)
        controller = RunController(options.runs_dir)
        try:
            from finetune.commands.page.page import TrainingPage
            from finetune.serving.chat.page import build_app

            app = build_app(TrainingPage(controller, Path.cwd()), access)
            serve_app(app, listener, access, PASSWORD)
        finally:
            _leave(controller, stops_run=options.stops_run)


def _leave(controller: RunController, *, stops_run: bool) -> None:
    """Says what becomes of a run, or ends it."""
    name = controller.current()
    if name is not None and stops_run:
        print_text(f'waiting for the run "{name}" to save and to end', stream=sys.stderr)
        controller.stop(name)
        controller.wait(name, _STOP_SECONDS)
    elif name is not None:
        print_text(
            f'the run "{name}" goes on; the same command shows it again, with --stop_run_with_page it would end',
            stream=sys.stderr,
        )
    controller.close()
