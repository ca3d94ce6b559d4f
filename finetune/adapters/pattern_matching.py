"""Regular expressions from users and from files, matched against names of layers in bounded time.

Python's matcher tries every way to divide a text among repeats: repeats inside repeats take time exponential in the
length of a name, and nothing in the process can end that. An expression with few repeats of single characters is
matched here; any other in a process of its own, which is ended when its time is up.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from finetune.errors import UserError

SECONDS = 10.0
"""Far more than any sensible expression takes: all names of a model take some milliseconds, a new process 0.1 s."""
MAX_CHARS = 1000
_MAX_REPEATS = 3
_HARD = re.compile(r"\)[*+?{]|\\[1-9]|\(\?[P(]")  # repeats of groups, references to groups
_CHILD = (
    "import json, re, sys\n"
    "patterns, names = json.load(sys.stdin)\n"
    "json.dump([[bool(re.fullmatch(each, name)) for name in names] for each in patterns], sys.stdout)\n"
)


def match_names(patterns: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """The names that each expression fits as a whole.

    Args:
        patterns: Regular expressions.
        names: Names of layers.

    Raises:
        UserError: One is no valid expression, or takes too long.
    """
    if faults := [fault for fault in map(find_pattern_fault, patterns) if fault]:
        raise UserError(faults)
    hard = [pattern for pattern in patterns if _is_hard(pattern)]
    fits = dict(zip(hard, _match_apart(hard, names) if hard else [], strict=True))
    for pattern in patterns:
        if pattern not in fits:
            fits[pattern] = [bool(re.fullmatch(pattern, name)) for name in names]
    return [[name for name, fit in zip(names, fits[pattern], strict=True) if fit] for pattern in patterns]


def find_pattern_fault(pattern: str) -> str | None:
    """Why a text is no regular expression; None when it is one."""
    if len(pattern) > MAX_CHARS:
        return (
            f"the pattern {pattern[:60]!r}... has {len(pattern)} characters, at most {MAX_CHARS} are allowed"
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{pattern!r} is no regular expression ({error}): correct it, or give the bare names of layers"
    return None


def _is_hard(pattern: str) -> bool:
    return bool(_HARD.search(pattern)) or sum(map(pattern.count, "*+{")) > _MAX_REPEATS


def _match_apart(patterns: Sequence[str], names: Sequence[str]) -> list[list[bool]]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([patterns, names]), capture_output=True, text=True, timeout=SECONDS, check=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{' or '.join(map(repr, patterns))} takes more than {SECONDS:g} s to compare with the names of this "
            "model's layers: avoid repeats inside repeats, or give the bare names of layers"
        ) from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or ["it ended"]
        raise UserError(
            f"{' or '.join(map(repr, patterns))} cannot be compared with names of layers ({last[0]}): simplify it"
        ) from None
    fits: list[list[bool]] = json.loads(done.stdout)
    return fits
