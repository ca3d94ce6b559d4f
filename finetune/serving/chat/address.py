"""Where a page is served and who may use it: options, checks, and the server itself."""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import Interrupted, UserError
from finetune.machine.screen import print_text
from finetune.processes.network.listener import allow_open_files
from finetune.serving.chat.guard import Access
from finetune.serving.web.hosts import own_names
from finetune.serving.web.listening import find_port_faults, is_loopback, url_of, warn_of_openness
from finetune.serving.web.secrets import SecretKind

_MAX_OPEN_FILES = 4096


@dataclass(frozen=True, kw_only=True)
class PageAddress:
    """Where a page listens and who may use it.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        password: What the browser must give; needed where `host` is not this machine alone.
        allowed_hosts: More names by which the page may be called, such as a proxy's.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    password: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()

    def faults(self, secret: SecretKind) -> list[str]:
        """What is wrong, one message each: a wrong port, other machines let in without a password, no Gradio."""
        found = find_port_faults(self.port)
        if (is_alone := is_loopback(self.host)) is not None:  # `access` looks at a name when it is resolved
            found += secret.faults(is_alone, self.password)
        if importlib.util.find_spec("gradio") is None:
            found.append("the page needs Gradio, which is not installed: pip install '.[chat]'")
        return found

    def access_by(self, listener: socket.socket, secret: SecretKind) -> Access:
        """Who may use the page on an open port.

        Raises:
            UserError: The address is not this machine's alone, and there is no password.
        """
        is_alone = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        if faults := secret.faults(is_alone, self.password):
            raise UserError(faults)
        return Access(
            own_names(self.host, self.allowed_hosts), self.password, is_behind_proxy=bool(self.allowed_hosts)
        )


def add_address_options(parser: Any, secret: SecretKind, *, port: int) -> None:
    """The options of `PageAddress`.

    Args:
        parser: A parser or a group of one.
        secret: The password.
        port: Default port.
    """
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in and needs a password (127.0.0.1)",
    )
    secret.add_option(parser, "the browser asks for")
    parser.add_argument(
        "--allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="more names by which browsers may call the page, such as a proxy's",
    )
    parser.add_argument(
        "--port", type=int, default=port, help=f"port to listen on, 0 for a free one ({port})"
    )
    parser.add_argument(
        "--share", choices=("never",), default="never", help="no tunnel to the internet is offered"
    )


def read_address(values: Mapping[str, Any], secret: SecretKind) -> dict[str, Any]:
    """The parsed options of `add_address_options`, as arguments of `PageAddress`.

    Raises:
        UserError: The password cannot be read.
    """
    return {
        "host": values["host"],
        "port": values["port"],
        "password": secret.read(values["password_file"]),
        "allowed_hosts": tuple(values["allowed_hosts"]),
    }


def serve_app(app: Any, listener: socket.socket, access: Access, secret: SecretKind) -> None:
    """Serves a page on an open port until the process is stopped."""
    import uvicorn

    from finetune.serving.web.connections import ImpatientProtocol

    warnings.filterwarnings("ignore", module="gradio")  # of what it calls in other libraries
    allow_open_files(_MAX_OPEN_FILES)
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=2,
        http=ImpatientProtocol,
        proxy_headers=access.is_behind_proxy,
        server_header=False,
    )
    server = uvicorn.Server(config)
    if warning := warn_of_openness(listener, secret.name):
        print_text(warning, stream=sys.stderr)
    print_text(f"Open {url_of(listener)} (Ctrl-C ends it)")
    try:
        server.run(sockets=[listener])
    except (KeyboardInterrupt, Interrupted):
        print_text("stopped", stream=sys.stderr)
