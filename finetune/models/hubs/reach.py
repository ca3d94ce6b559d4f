"""Whether an address answers at all, told within seconds."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

CONNECT_TIMEOUT_SECONDS = 3.0


def is_reachable(url: str, timeout_seconds: float = CONNECT_TIMEOUT_SECONDS) -> bool:
    """Whether a connection to an address, or to the proxy on the way to it, opens in time."""
    address = urlsplit(url)
    proxy = None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)
    target = urlsplit(proxy if "://" in proxy else f"//{proxy}") if proxy else address
    port = target.port or (443 if target.scheme == "https" else 80)
    return _connects(target.hostname or "", port, timeout_seconds)


def _connects(host: str, port: int, timeout_seconds: float) -> bool:
    """One attempt in a thread of its own, because a name look-up obeys no time-out."""
    outcome: list[bool] = []

    def attempt() -> None:
        try:
            with socket.create_connection((host, port), timeout=timeout_seconds):
                outcome.append(True)
        except OSError:
            outcome.append(False)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return outcome == [True]
