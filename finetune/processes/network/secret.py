"""The secret that the processes of one run share and nobody else knows.

Nothing that Paddle's launcher hands out is secret: the addresses of all ranks stand in its store, which everybody on
the network can read. So the ranks get theirs in one of two ways:

- `FINETUNE_JOB_SECRET` in the environment, set to the same text on every host by the person who launches.
- Otherwise rank 0 draws one and leaves it for the others in a file that only this user can read (mode 600, checked by
  whoever reads it), until all have connected: in a folder of this user's below the system's temporary folder where all
  ranks run on one machine, in the run's output folder, which all ranks must share, where they run on several.

What the ranks prove to each other is not the secret but a key made of it and of the addresses of all ranks, so that
two runs under one `FINETUNE_JOB_SECRET` do not mix.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from finetune.errors import UserError

VARIABLE = "FINETUNE_JOB_SECRET"
MIN_LENGTH = 16
_SECRET_BYTES = 32
_FILE_BYTES = 2 * _SECRET_BYTES  # in hexadecimal
SECRET_PREFIX = ".job-secret-"
_STALE_SECONDS = 3600
_LOOK_AGAIN_SECONDS = 0.1

# Of this process, by job: keys, and files that wait to be removed.
_keys: dict[str, bytes] = {}
_issued: dict[str, JobSecret] = {}


class JobSecret:
    """How this process comes to the key of its run.

    Args:
        endpoints: "address:port" of all ranks, as the launcher gave them.
        folder: A folder that all hosts share; needed only where there are several and the environment has no secret.

    Raises:
        UserError: The secret in the environment is too short, or there is no place to leave one for the other ranks.
    """

    def __init__(self, endpoints: Sequence[str], folder: Path | None = None):
        self._job = ",".join(endpoints)
        self._given = os.environ.get(VARIABLE, "")
        self._path: Path | None = None
        self._made_folder: Path | None = None
        if self._given:
            if len(self._given) < MIN_LENGTH:
                raise UserError(
                    f"{VARIABLE} has {len(self._given)} characters but must have at least {MIN_LENGTH}: set it to "
                    "the same long random text on every host, such as the output of `openssl rand -hex 32`"
                )
            return
        machines = {one.rpartition(":")[0] for one in endpoints}
        if len(machines) > 1 and folder is None:
            raise UserError(
                f"the processes run on {len(machines)} hosts and {VARIABLE} is not set: set it to the same long random "
                "text on every host, such as the output of `openssl rand -hex 32`"
            )
        name = SECRET_PREFIX + hashlib.sha256(self._job.encode()).hexdigest()[:16]
        self._path = (folder if folder is not None and len(machines) > 1 else _private_folder()) / name

    def issue(self) -> bytes:
        """The key, on rank 0, which leaves a new secret for the others where the environment has none.

        Raises:
            UserError: The file cannot be written, or other users could read it.
        """
        if self._path is None:
            return self.remember(self._key(self._given))
        secret = secrets.token_hex(_SECRET_BYTES)
        try:
            self._make_folder(self._path.parent)
            _remove_stale(self._path.parent)
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=SECRET_PREFIX)  # mode 600
            with os.fdopen(handle, "w") as file:
                file.write(secret)
            os.replace(name, self._path)
        except OSError as error:
            raise UserError(
                f"no secret for the other processes can be left in {self._path.parent} ({error.strerror or error}): "
                f"make it writable, or set {VARIABLE} to the same long random text on every host"
            ) from None
        _issued[self._job] = self
        _read(self._path)
        return self.remember(self._key(secret))

    def look_up(self) -> bytes | None:
        """The key, on the other ranks; None where rank 0 has not left its secret yet.

        Raises:
            UserError: There is a file, but not one that only this user could have written and read.
        """
        if self._path is None:
            return self._key(self._given)
        secret = _read(self._path)
        return None if secret is None else self._key(secret)

    def remember(self, key: bytes) -> bytes:
        """Keeps a key, which another rank knew too, for the connections that are still to be made."""
        _keys[self._job] = key
        return key

    def withdraw(self) -> None:
        """Removes the file, on rank 0, once nobody needs it any more."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        if self._made_folder is not None:
            with suppress(OSError):  # something else has come to stand in it
                self._made_folder.rmdir()

    def where(self) -> str:
        """Where the secret comes from, for messages."""
        return VARIABLE if self._path is None else str(self._path)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            self._made_folder = folder

    def _key(self, secret: str) -> bytes:
        return hmac.digest(secret.encode(), f"finetune job\n{self._job}".encode(), "sha256")


def shared_key(rank: int, endpoints: Sequence[str], *, timeout_seconds: float) -> bytes:
    """The key of this process's run: the one that the watch has agreed on, or one that is agreed on now.

    Raises:
        UserError: There is none, or no safe place for one.
    """
    if (known := _keys.get(",".join(endpoints))) is not None:
        return known
    secret = JobSecret(endpoints)
    if rank == 0:
        return secret.issue()
    deadline = time.monotonic() + timeout_seconds
    while (key := secret.look_up()) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"rank 0 left no secret at {secret.where()} within {timeout_seconds:g} s: see its log, or set "
                f"{VARIABLE} to the same long random text for all processes"
            )
        time.sleep(_LOOK_AGAIN_SECONDS)
    return secret.remember(key)


def withdraw_secret(endpoints: Sequence[str]) -> None:
    """Removes what rank 0 has left for the others, once all have connected."""
    if (secret := _issued.pop(",".join(endpoints), None)) is not None:
        secret.withdraw()


def _private_folder() -> Path:
    """A folder of this user's alone, for secrets between processes of one machine."""
    folder = Path(tempfile.gettempdir()) / f"finetune-{os.geteuid()}"
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError as error:
        raise UserError(
            f"the folder {folder} for the secret between processes cannot be made ({error.strerror or error}): set "
            f"TMPDIR to a folder that can be written, or {VARIABLE} to a long random text"
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise UserError(
            f"{folder} must be a folder that belongs to you and that nobody else can enter (mode 700): remove it, set "
            f"TMPDIR to another folder, or set {VARIABLE} to a long random text"
        )
    return folder


def _read(path: Path) -> str | None:
    """The secret in a file, None where there is none; the file must be this user's alone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _refusal(path, error.strerror or str(error)) from None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise _refusal(path, "it is no file")
        if status.st_uid != os.geteuid():
            raise _refusal(path, "it belongs to another user")
        if status.st_mode & 0o077:
            raise _refusal(path, f"others may read it (mode {stat.S_IMODE(status.st_mode):o})")
        data = file.read(_FILE_BYTES + 1)
    if len(data) != _FILE_BYTES:
        raise _refusal(path, f"it does not hold {_FILE_BYTES} characters")
    return data.decode("ascii", "replace")


def _refusal(path: Path, reason: str) -> UserError:
    return UserError(
        f"the secret between processes in {path} cannot be trusted ({reason}): remove that file, or set {VARIABLE} to "
        "the same long random text on every host"
    )


def _remove_stale(folder: Path) -> None:
    """Removes what runs left that were killed while they connected."""
    for path in folder.glob(f"{SECRET_PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > _STALE_SECONDS:
                path.unlink()
