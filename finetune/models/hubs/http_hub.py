"""What hubs over a plain HTTP interface share: files arrive under another name and are checked before they get their own."""

from __future__ import annotations

import fcntl
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from finetune.errors import UserError

_TIMEOUT_SECONDS = 30.0
_BLOCK_BYTES = 2**20
_MAX_LIST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class RemoteFile:
    """What a hub says of a file.

    Attributes:
        size: In bytes; None where it does not say.
        sha256: In hexadecimal digits; None where it does not say.
    """

    size: int | None = None
    sha256: str | None = None


class HttpHub(ABC):
    """See `finetune.models.hubs.repository.Hub`.

    Attributes:
        title: Its name, for messages.
        token_variable: Environment variable with the token of who asks.
    """

    title: str
    token_variable: str

    @abstractmethod
    def endpoint(self) -> str:
        """Its address."""

    @abstractmethod
    def list_address(self, name: str, revision: str | None, kind: str) -> str:
        """Where the list of a repository's files is."""

    @abstractmethod
    def file_address(self, name: str, revision: str | None, kind: str, file: str) -> str:
        """Where a file is."""

    @abstractmethod
    def read_list(self, content: Any) -> dict[str, RemoteFile]:
        """Files by path, out of the list."""

    @abstractmethod
    def folder(self, name: str, revision: str | None, kind: str) -> Path:
        """Where a repository is kept."""

    @abstractmethod
    def authorization(self) -> str | None:
        """The header that says who asks; None for nobody."""

    def cached(self, name: str, revision: str | None, kind: str) -> Path | None:
        """The folder of an earlier download."""
        folder = self.folder(name, revision, kind)
        return folder if folder.is_dir() else None

    def files(self, name: str, revision: str | None, kind: str) -> list[str] | None:
        """Paths of all files; None where there is no such repository."""
        listed = self._list(name, revision, kind)
        return None if listed is None else sorted(listed)

    def fetch(self, name: str, revision: str | None, kind: str, files: Sequence[str]) -> Path:
        """Downloads files that are not in the cache; gives the folder."""
        folder = self.folder(name, revision, kind)
        facts = self._list(name, revision, kind) or {}
        with self._readable_errors(name):
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                address, target = self.file_address(name, revision, kind, file), folder / file
                with _alone(folder):
                    if not _is_whole(target, facts[file]):
                        self._download(address, target, facts[file], f"{file} of {name}")
        return folder

    def _list(self, name: str, revision: str | None, kind: str) -> dict[str, RemoteFile] | None:
        with self._readable_errors(name):
            try:
                with self._open(self.list_address(name, revision, kind)) as answer:
                    listed = self.read_list(json.loads(answer.read(_MAX_LIST_BYTES)))
            except HTTPError as error:
                if error.code == 404:
                    return None
                raise
            return {path: facts for path, facts in listed.items() if _is_inside(path)}
        return None

    def _open(self, address: str) -> Any:
        request = Request(address)
        if who := self.authorization():
            request.add_header("Authorization", who)
        return urlopen(request, timeout=_TIMEOUT_SECONDS)

    def _download(self, address: str, target: Path, facts: RemoteFile, what: str) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        arriving = target.with_name(f".{target.name}.part")
        digest = hashlib.sha256()
        with self._open(address) as answer, arriving.open("wb") as out:
            announced = answer.headers.get("Content-Length")
            while block := answer.read(_BLOCK_BYTES):
                digest.update(block)
                out.write(block)
        whole = _is_whole(arriving, facts) and announced in (None, str(arriving.stat().st_size))
        if not whole or facts.sha256 not in (None, digest.hexdigest()):
            arriving.unlink()
            raise UserError(f"{what} arrived damaged from {self.title} ({self.endpoint()}): try again")
        arriving.replace(target)

    @contextmanager
    def _readable_errors(self, name: str) -> Iterator[None]:
        where = f"{name} cannot be downloaded from {self.title} ({self.endpoint()})"
        try:
            yield
        except HTTPError as error:
            denied = error.code in (401, 403)
            hint = f"set {self.token_variable}" if denied else "check name and revision, or try again"
            raise UserError(f"{where}: the hub answers {error.code}; {hint}") from error
        except KeyError as error:
            raise UserError(f"{where}: it has no {error}. Check name and revision") from error
        except (URLError, OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{where}: {error}. Try again: whole files that have arrived are kept") from error


def _is_inside(path: str) -> bool:
    """Whether a path that a hub names stays in the folder it is meant for."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\\" not in path


def _is_whole(path: Path, facts: RemoteFile) -> bool:
    return path.is_file() and facts.size in (None, path.stat().st_size)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time downloads into a folder; the others find the files afterwards."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
