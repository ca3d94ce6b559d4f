"""Hugging Face's hub, or a mirror of it, through its own client and into its own cache.

`HF_ENDPOINT` names a mirror, `HF_HOME` or `HF_HUB_CACHE` the cache, `HF_TOKEN` who asks; with `HF_HUB_OFFLINE` only the
cache is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import UserError

_TRUE = ("1", "ON", "YES", "TRUE")


class HuggingFace:
    """See `finetune.models.hubs.repository.Hub`."""

    title = "Hugging Face"

    def endpoint(self) -> str:
        """Its address."""
        return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    def cached(self, name: str, revision: str | None, kind: str) -> Path | None:
        """The snapshot of an earlier download."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(
                    name, repo_type=kind, revision=revision, cache_dir=_cache(), local_files_only=True
                )
            )
        except (LocalEntryNotFoundError, OSError):
            return None

    def files(self, name: str, revision: str | None, kind: str) -> list[str] | None:
        """Paths of all files; None where there is no such repository, or none that this user may see."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        with _readable_errors(name, self.endpoint()):
            try:
                facts = HfApi(endpoint=self.endpoint()).repo_info(name, repo_type=kind, revision=revision)
                return [each.rfilename for each in facts.siblings or []]
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None
        return None

    def fetch(self, name: str, revision: str | None, kind: str, files: Sequence[str]) -> Path:
        """Downloads files that are not in the cache; gives the snapshot."""
        from huggingface_hub import hf_hub_download

        with _readable_errors(name, self.endpoint()):
            paths = [
                hf_hub_download(
                    name,
                    file,
                    repo_type=kind,
                    revision=revision,
                    cache_dir=_cache(),
                    endpoint=self.endpoint(),
                )
                for file in files
            ]
        depth = files[-1].count("/") + 1
        return Path(paths[-1]).parents[depth - 1]


def is_offline() -> bool:
    """Whether the user wants nothing to be asked of the network."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)


def _cache() -> Path:
    home = (
        os.environ.get("HF_HOME")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


@contextmanager
def _readable_errors(name: str, endpoint: str) -> Iterator[None]:
    """What the client raises, as one line with what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    where = f"{name} cannot be downloaded from Hugging Face ({endpoint})"
    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"{where}: its owner asks for consent first. Give it on the page of the model, and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{where}: it has no such revision. Check what stands behind @") from error
    except HfHubHTTPError as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}: {str(error).splitlines()[0] if str(error) else type(error).__name__}. Try again: what has arrived is kept"
        ) from error
