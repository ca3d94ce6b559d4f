"""The options of the server."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import UserError
from finetune.machine.command_names import SERVE, usage_name
from finetune.machine.command_parser import CommandParser
from finetune.serving.decoding.options import ModelOptions, add_model_options, model_options
from finetune.serving.web.listening import find_port_faults, is_loopback
from finetune.serving.web.secrets import SecretKind

API_KEY = SecretKind("the API key", "api_key_file", "FINETUNE_API_KEY", "the server")
_MAX_PROMPT = 8192


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What is served, where, and within which limits.

    Attributes:
        model: The model.
        served_name: By which requests name it.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_key: What requests must give; needed where `host` is not this machine alone.
        allowed_hosts: More names by which the server may be called, such as a proxy's.
        max_batch_size: Most answers that are made at the same time.
        max_waiting: Most answers that wait beside them.
        max_new_tokens: Most tokens of an answer.
        temperature: Where a request names none.
        top_p: Where a request names none.
        request_timeout: Longest time of a request, seconds.
        shutdown_timeout: Longest time for what is being answered when the server is told to end, seconds.
    """

    model: ModelOptions
    served_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    max_batch_size: int = 16
    max_waiting: int = 64
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    request_timeout: float = 600.0
    shutdown_timeout: float = 30.0

    def check(self) -> None:
        """Says what is wrong before anything is loaded.

        Raises:
            UserError: A value out of range, other machines let in without a key, or uvicorn is not installed.
        """
        faults = [
            f"{name} is {getattr(self, name)} but must be {allowed}: change --{name}"
            for name, allowed, is_right in (
                ("max_batch_size", "1 to 1024", 1 <= self.max_batch_size <= 1024),
                ("max_waiting", "0 to 100000", 0 <= self.max_waiting <= 100_000),
                ("max_new_tokens", "at least 1", self.max_new_tokens >= 1),
                ("temperature", "0 to 2", 0 <= self.temperature <= 2),
                ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
                ("request_timeout", "above 0 and at most 86400", 0 < self.request_timeout <= 86400),
                ("shutdown_timeout", "0 to 86400", 0 <= self.shutdown_timeout <= 86400),
            )
            if not is_right
        ]
        if not self.served_name.isprintable() or not self.served_name.strip():
            faults.append(
                "served_model_name must have a character that can be seen: change --served_model_name"
            )
        faults += find_port_faults(self.port)
        if (is_alone := is_loopback(self.host)) is not None:  # a name is looked at when it is resolved
            faults += API_KEY.faults(is_alone, self.api_key)
        missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
        if missing:
            faults.append(
                f"the server needs {' and '.join(missing)}, not installed here: pip install '.[serve]'"
            )
        if faults:
            raise UserError(faults)

    def check_listener(self, listener: socket.socket) -> None:
        """Makes sure that the address that a name stands for may be listened on.

        Raises:
            UserError: It is not this machine's alone, and there is no key.
        """
        is_alone = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        if faults := API_KEY.faults(is_alone, self.api_key):
            raise UserError(faults)


def parse_options(argv: Sequence[str] | None = None) -> ServeOptions:
    """Reads the command line; exits with 2 and the usage where it cannot be read.

    Raises:
        UserError: The file of the key cannot be read.
    """
    parser = CommandParser(
        prog=usage_name(SERVE), description="A server with OpenAI's interface for one model."
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="the model: the same as --model_name_or_path"
    )
    _add_server_options(parser)
    _add_request_options(parser)
    add_model_options(parser, needs_name=False, src_length=_MAX_PROMPT)
    values = vars(parser.parse_args(argv))
    named = [name for name in (values["model"], values["model_name_or_path"]) if name is not None]
    if len(named) != 1:
        parser.error("give one model: its folder or name, or --model_name_or_path")
    values["model_name_or_path"] = named[0]
    model = model_options(values)
    shown = Path(model.adapter or model.model_name_or_path)
    own = ServeOptions.__dataclass_fields__.keys() - {"model", "served_name", "api_key", "allowed_hosts"}
    return ServeOptions(
        model=model,
        served_name=values["served_model_name"] or shown.name or shown.resolve().name or "model",
        api_key=API_KEY.read(values["api_key_file"]),
        allowed_hosts=tuple(values["allowed_hosts"]),
        **{name: values[name] for name in own},
    )


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in and needs a key (127.0.0.1)",
    )
    group.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for a free one (8000)")
    API_KEY.add_option(group, "requests must give")
    group.add_argument(
        "--allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="more names by which the server may be called, such as a proxy's",
    )
    group.add_argument(
        "--served_model_name",
        help="by which requests name the model (the name of the adapter's or model's folder)",
    )
    group.add_argument(
        "--max_batch_size", type=int, default=16, help="most answers that are made at the same time (16)"
    )
    group.add_argument(
        "--max_waiting", type=int, default=64, help="most answers that wait; more requests get 429 (64)"
    )
    group.add_argument("--request_timeout", type=float, default=600.0, help="most seconds of a request (600)")
    group.add_argument(
        "--shutdown_timeout",
        type=float,
        default=30.0,
        help="most seconds for what is being answered when the server is stopped (30)",
    )


def _add_request_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--max_new_tokens",
        type=int,
        default=1024,
        help="most tokens of an answer; what a request gets that names no number, and may ask for (1024)",
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, help="where a request names none; 0 is greedy (1)"
    )
    group.add_argument("--top_p", type=float, default=1.0, help="where a request names none (1)")
