"""Two processes prove to each other that they know the key of their run, without telling it.

    acceptor  -> connector   magic, nonce A
    connector -> acceptor    rank, nonce C, HMAC(key, "connector", context, rank, A, C)
    acceptor  -> connector   HMAC(key, "acceptor", context, rank, A, C)

HMAC is SHA-256's (RFC 2104). Both nonces are new for every connection, so nothing that was overheard opens another
one; the roles differ, so no side's proof can be sent back to it; the context names what the connection is for and the
port where the acceptor listens, so that a process in between, at another port, cannot pass the proofs on. All messages
have a fixed size: nothing is parsed before the other side has proved itself.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time

_MAGIC = b"FINETUNE"
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_GREETING_BYTES = len(_MAGIC) + _NONCE_BYTES
_RANK = struct.Struct("!I")
HELLO_BYTES = _RANK.size + _NONCE_BYTES + _PROOF_BYTES
HANDSHAKE_SECONDS = 10.0


class Challenge:
    """The acceptor's side for one connection.

    Args:
        key: Of the run.
        context: What the connection is for, in the same words on both sides.
    """

    def __init__(self, key: bytes, context: str):
        self._key = key
        self._context = context
        self._nonce = secrets.token_bytes(_NONCE_BYTES)

    @property
    def greeting(self) -> bytes:
        """What to send first."""
        return _MAGIC + self._nonce

    def check(self, hello: bytes) -> tuple[int, bytes] | None:
        """The rank that a hello of `HELLO_BYTES` proves, and what to answer; None where it proves nothing."""
        rank = hello[: _RANK.size]
        nonce = hello[_RANK.size : _RANK.size + _NONCE_BYTES]
        shared = rank + self._nonce + nonce
        if not hmac.compare_digest(
            hello[-_PROOF_BYTES:], _proof(self._key, "connector", self._context, shared)
        ):
            return None
        return _RANK.unpack(rank)[0], _proof(self._key, "acceptor", self._context, shared)


def introduce(connection: socket.socket, key: bytes, context: str, rank: int) -> bool:
    """The connector's side: whether the other end knows the key, too. Takes at most `HANDSHAKE_SECONDS`.

    Args:
        connection: Just made; its timeout is changed.
        key: Of the run.
        context: As for `Challenge`.
        rank: Of this process.
    """
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    try:
        greeting = _receive(connection, _GREETING_BYTES, deadline)
        if greeting is None or not greeting.startswith(_MAGIC):
            return False
        nonce = secrets.token_bytes(_NONCE_BYTES)
        shared = _RANK.pack(rank) + greeting[len(_MAGIC) :] + nonce
        connection.sendall(_RANK.pack(rank) + nonce + _proof(key, "connector", context, shared))
        answer = _receive(connection, _PROOF_BYTES, deadline)
    except OSError:
        return False
    return answer is not None and hmac.compare_digest(answer, _proof(key, "acceptor", context, shared))


def _proof(key: bytes, role: str, context: str, shared: bytes) -> bytes:
    return hmac.digest(key, f"{role}\n{context}\n".encode() + shared, "sha256")


def _receive(connection: socket.socket, num_bytes: int, deadline: float) -> bytes | None:
    """Exactly that many bytes; None where they do not come in time."""
    data = b""
    while len(data) < num_bytes:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        part = connection.recv(num_bytes - len(data))
        if not part:
            return None
        data += part
    return data
