"""AI Studio, the hub of PaddlePaddle: a Gitea whose repositories are models.

`AISTUDIO_ENDPOINT` names another address, `AISTUDIO_CACHE_HOME` the folder above the cache, `AISTUDIO_ACCESS_TOKEN` who
asks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from finetune.models.hubs.http_hub import HttpHub, RemoteFile


class AIStudio(HttpHub):
    """See `finetune.models.hubs.http_hub.HttpHub`."""

    title = "AI Studio"
    token_variable = "AISTUDIO_ACCESS_TOKEN"

    def endpoint(self) -> str:
        """Its address."""
        return (os.environ.get("AISTUDIO_ENDPOINT") or "http://git.aistudio.baidu.com").rstrip("/")

    def list_address(self, name: str, revision: str | None, kind: str) -> str:
        """The files of the uppermost folder, where models have all that is needed of them."""
        return f"{self.endpoint()}/api/v1/repos/{quote(name)}/contents{_query(revision)}"

    def file_address(self, name: str, revision: str | None, kind: str, file: str) -> str:
        """Where a file is, wherever its contents are stored."""
        return f"{self.endpoint()}/api/v1/repos/{quote(name)}/media/{quote(file)}{_query(revision)}"

    def read_list(self, content: Any) -> dict[str, RemoteFile]:
        """Files by path; the sizes told are those of pointers to large files, and so of no use."""
        return {entry["path"]: RemoteFile() for entry in content if entry.get("type") == "file"}

    def folder(self, name: str, revision: str | None, kind: str) -> Path:
        """Where it is kept; another revision than the newest gets a folder of its own."""
        root = Path(os.environ.get("AISTUDIO_CACHE_HOME") or Path.home()) / ".cache" / "aistudio" / "finetune"
        return root / f"{kind}s" / (name + (f"@{revision.replace('/', '___')}" if revision else ""))

    def authorization(self) -> str | None:
        """The header that says who asks."""
        token = os.environ.get(self.token_variable)
        return f"token {token}" if token else None


def _query(revision: str | None) -> str:
    return f"?ref={quote(revision, safe='')}" if revision else ""
