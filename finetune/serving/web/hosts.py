"""By which names a server may be called, so that no web page in a browser can reach it under another one."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit


def own_names(host: str, others: Iterable[str] = ()) -> frozenset[str]:
    """Names by which a server is called that listens on a host.

    Args:
        host: Address or name that it listens on.
        others: More names, such as a proxy's.
    """
    names = {"localhost", host.lower(), *(other.lower() for other in others)}
    try:
        if ipaddress.ip_address(host).is_loopback:
            return frozenset(names)
    except ValueError:
        if host.lower() == "localhost":
            return frozenset(names)
    return frozenset(names | {socket.gethostname().lower(), socket.getfqdn().lower()})


def is_known_host(host: str, names: Iterable[str]) -> bool:
    """Whether a header Host (name or address, with or without a port) is a server's.

    An IP address always is: a browser that was tricked says the name that it was tricked with.
    """
    name = _name_of(host)
    with suppress(ValueError):
        ipaddress.ip_address(name.strip("[]"))
        return True
    return name in names


def place_of(origin: str) -> str:
    """The "host:port" of a header Origin; "" where it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:  # brackets that do not match
        return ""


def _name_of(host: str) -> str:
    """The name or address of a "host:port", in small letters."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].rstrip(".")
