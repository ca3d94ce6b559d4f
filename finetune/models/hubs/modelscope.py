"""ModelScope's hub, over the HTTP interface that its own client uses, into that client's cache.

`MODELSCOPE_ENDPOINT` (or `MODELSCOPE_DOMAIN`) names another address, `MODELSCOPE_CACHE` the cache,
`MODELSCOPE_API_TOKEN` who asks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from finetune.models.hubs.http_hub import HttpHub, RemoteFile

_NEWEST = "master"


class ModelScope(HttpHub):
    """See `finetune.models.hubs.http_hub.HttpHub`."""

    title = "ModelScope"
    token_variable = "MODELSCOPE_API_TOKEN"

    def endpoint(self) -> str:
        """Its address."""
        domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        return (os.environ.get("MODELSCOPE_ENDPOINT") or f"https://{domain}").rstrip("/")

    def list_address(self, name: str, revision: str | None, kind: str) -> str:
        """Models have a list of files, data sets a tree."""
        query = {
            "Revision": revision or _NEWEST,
            "Recursive": "True",
            "Root": "",
            "PageNumber": 1,
            "PageSize": 1000,
        }
        listing = "files" if kind == "model" else "tree"
        return f"{self.endpoint()}/api/v1/{kind}s/{name}/repo/{listing}?{urlencode(query)}"

    def file_address(self, name: str, revision: str | None, kind: str, file: str) -> str:
        """Where a file is."""
        query = {"Revision": revision or _NEWEST, "FilePath": file}
        return f"{self.endpoint()}/api/v1/{kind}s/{name}/repo?{urlencode(query)}"

    def read_list(self, content: Any) -> dict[str, RemoteFile]:
        """Files by path, out of the list."""
        entries = (content.get("Data") or {}).get("Files") or []
        return {
            entry["Path"]: RemoteFile(entry.get("Size"), entry.get("Sha256") or None)
            for entry in entries
            if entry.get("Type") != "tree"
        }

    def folder(self, name: str, revision: str | None, kind: str) -> Path:
        """Where ModelScope's client keeps it; another revision than the newest gets a folder of its own."""
        root = os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope" / "hub"
        leaf = name.replace(".", "___") + (f"@{revision.replace('/', '___')}" if revision else "")
        return Path(root) / f"{kind}s" / leaf

    def authorization(self) -> str | None:
        """The header that says who asks."""
        token = os.environ.get(self.token_variable)
        return f"Bearer {token}" if token else None
