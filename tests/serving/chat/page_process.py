"""A page as the process of its command."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT


@contextmanager
def served(
    command: Sequence[str], *, errors_file: Path, cwd: Path = ROOT, end_seconds: float = 30
) -> Iterator[str]:
    """The address of a page while its command runs; it must end within the time, and in silence."""
    with errors_file.open("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            errors.seek(0)
            assert found, errors.read()
            yield found[0]
        finally:
            process.terminate()
            assert process.wait(end_seconds) == 0
            errors.seek(0)
            told = errors.read()
            assert "Traceback" not in told and "ERROR" not in told, told
