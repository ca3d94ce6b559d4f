"""The port of a server."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress

from finetune.errors import UserError


def find_port_faults(port: int) -> list[str]:
    """What is wrong with the number of a port."""
    return [] if 0 <= port <= 65535 else [f"port is {port} but must be 0 to 65535: change --port"]


def is_loopback(host: str) -> bool | None:
    """Whether an address is this machine's alone; None for a name, which has to be resolved first."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return None


def listen(host: str, port: int) -> socket.socket:
    """Takes the port before minutes of loading.

    Raises:
        UserError: It is taken, or there is no such address.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror or error}): give another --port or --host"
        ) from None
    except (UnicodeError, ValueError):  # a name that no name server could know
        raise UserError(f"host {host!r} is no address and no name: change --host") from None


def url_of(listener: socket.socket) -> str:
    """The address of a server as this machine calls it."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    shown = ("::1" if address.version == 6 else "127.0.0.1") if address.is_unspecified else host
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"


def warn_of_openness(listener: socket.socket, secret: str) -> str | None:
    """What to say of a server that others can reach; None where they cannot."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_loopback:
        return None
    return (
        f"Everyone who reaches port {port} of this machine and knows {secret} can use the model. Nothing is "
        "encrypted: put a proxy with TLS in front, or use an SSH tunnel, on a network that others can read."
    )
