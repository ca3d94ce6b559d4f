"""A chat page in the browser, for one model or for two side by side.

python -m finetune.chat --model_name_or_path ./checkpoints/llama --lora_path ./checkpoints/mine
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.machine.command_names import CHAT, usage_name
from finetune.machine.command_parser import CommandParser
from finetune.machine.device import device_kind
from finetune.machine.environment import check_machine
from finetune.machine.processor import configure_processor
from finetune.machine.quiet import silence_libraries
from finetune.machine.screen import print_text
from finetune.processes.command import run_command
from finetune.serving.chat.address import PageAddress, add_address_options, read_address, serve_app
from finetune.serving.chat.guard import Access
from finetune.serving.decoding.options import (
    ModelOptions,
    add_decoding_options,
    add_model_options,
    decoding_settings,
    model_options,
)
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.web.listening import listen
from finetune.serving.web.secrets import SecretKind

if TYPE_CHECKING:
    from finetune.serving.chat.panel import Side

PASSWORD = SecretKind("the password", "password_file", "FINETUNE_CHAT_PASSWORD", "the page")


@dataclass(frozen=True, kw_only=True)
class ChatOptions(PageAddress):
    """What the page shows, and where.

    Attributes:
        model: The model.
        settings: Where the controls stand at first.
        second_model: Another model beside it.
        compare: Whether an adapter is shown beside its base.
    """

    model: ModelOptions
    settings: DecodingSettings
    second_model: str | None = None
    compare: bool = True

    @property
    def second(self) -> ModelOptions | None:
        """The options of the second model."""
        if self.second_model is None:
            return None
        return replace(
            self.model, model_name_or_path=self.second_model, lora_path=None, prefix_path=None, mode=None
        )

    def check(self) -> None:
        """Says what is wrong before anything is loaded.

        Raises:
            UserError: A second model beside an adapter, a wrong port, other machines let in without a password, or
                Gradio is not installed.
        """
        faults = []
        if self.second_model and self.model.adapter:
            faults.append(
                "second_model is given with lora_path or prefix_path, but the page has two columns: "
                "an adapter is shown beside its base already; leave one out"
            )
        faults += self.faults(PASSWORD)
        if faults:
            raise UserError(faults)

    def access(self, listener: socket.socket) -> Access:
        """Who may use the page.

        Raises:
            UserError: The address is not this machine's alone, and there is no password.
        """
        return self.access_by(listener, PASSWORD)


def parse_options(argv: Sequence[str] | None = None) -> ChatOptions:
    """Reads the command line; exits with 2 and the usage where it cannot be read.

    Raises:
        UserError: A value is out of range.
    """
    description = "A chat page in the browser, for one model or for two side by side."
    parser = CommandParser(prog=usage_name(CHAT), description=description)
    group = parser.add_argument_group("page")
    group.add_argument("--second_model", help="another model, shown beside the first")
    group.add_argument(
        "--no_compare", action="store_true", help="show a model with its adapter alone, not beside its base"
    )
    add_address_options(group, PASSWORD, port=7860)
    add_model_options(parser)
    add_decoding_options(parser)
    values = vars(parser.parse_args(argv))
    settings = decoding_settings(values)
    if values["top_k"] is None and settings.is_greedy:
        # Greedy by temperature, so that moving this one control of the page turns sampling on.
        settings = replace(settings, top_k=0, temperature=0.0)
    return ChatOptions(
        model=model_options(values),
        settings=settings,
        second_model=values["second_model"],
        compare=not values["no_compare"],
        **read_address(values, PASSWORD),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, checks, loads, serves until it is stopped."""
    options = parse_options(argv)
    check_machine()
    options.check()
    if device_kind(options.model.device) == "cpu":
        configure_processor()
    # Read when Gradio is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with listen(options.host, options.port) as listener:
        access = options.access(listener)
        sides = load_sides(options)
        serve(sides, options.settings, listener, access)


def load_sides(options: ChatOptions) -> list[Side]:
    """Loads the models of the page.

    Raises:
        UserError: One of them cannot be used.
    """
    from finetune.serving.predict.loading import load_pair, load_responder, plan_model

    plans = [plan_model(each) for each in (options.model, options.second) if each]
    silence_libraries()
    for plan in plans:
        print_text(*plan.notes, stream=sys.stderr)
    from finetune.serving.chat.panel import Side

    name, adapter = options.model.model_name_or_path, options.model.adapter
    if adapter and options.compare:
        base, tuned = load_pair(plans[0])
        return [Side(base, _short(name), "before"), Side(tuned, _short(adapter), "after")]
    roles = ("before", "after") if len(plans) > 1 else ("model",)
    shown = [adapter or name, options.second_model or ""]
    return [
        Side(load_responder(plan), _short(each), role)
        for plan, each, role in zip(plans, shown, roles, strict=False)
    ]


def serve(
    sides: Sequence[Side], settings: DecodingSettings, listener: socket.socket, access: Access | None = None
) -> None:
    """Serves the page on an open port until the process is stopped."""
    from finetune.serving.chat.page import ChatPage, build_app

    access = access or Access()
    serve_app(build_app(ChatPage(sides, settings), access), listener, access, PASSWORD)


def _short(name: str | Path) -> str:
    return Path(name).name or str(name)


if __name__ == "__main__":
    sys.exit(run_command(main))
