"""Rendering of jinja texts that come with models, within limits.

The sandbox of jinja keeps a template away from the program, but not from its time and memory: two loops, a product, a
list that holds itself twice over and over, a format with a width, and any of them already when it is compiled. No list
of guarded operations would be complete, so a template is rendered in a process of its own (`template_worker`), which
the kernel limits. Only where reading its syntax shows that the work cannot exceed its length times that of the texts
(`is_linear`: no loop, no macro, no product, nothing assigned), it is rendered here, which is what parts of
PaddleNLP's ``chat_template.json`` need: they are rendered anew for every round, and asking another process
takes about 0.1 ms.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2

from finetune.data.templates import template_worker
from finetune.data.templates.jinja_environment import (
    CHAT,
    RENDER_ERRORS,
    TEXT_PARTS,
    describe,
    make_environment,
)
from finetune.data.templates.template_clock import fixed_day
from finetune.data.templates.template_syntax import is_linear, takes_parts
from finetune.data.templates.template_worker import Variant
from finetune.errors import RunError, UserError

MAX_SECONDS = 1.0
"""Of computing for a request, beside `_SECONDS_PER_BYTE`."""
MAX_SOURCE_CHARACTERS = 1_000_000
_SECONDS_PER_BYTE = 2e-6  # of the values; templates take about 1e-8
_MAX_REQUESTED = 64  # texts at once
_MAX_WAIT_SECONDS = 120  # for an answer, when other processes have the cores
_CHUNK_BYTES = 2**20
_REMEDY = "give chat_template another name or file"


class SourceError(Exception):
    """A text that is no valid jinja; its message says why."""


class RenderError(Exception):
    """A valid template that does not take the values; its message says why."""


class Renderer:
    """Renders one jinja text.

    Args:
        source: The text.
        name: What to call it in messages.
        kind: See `finetune.data.templates.jinja_environment`.

    Raises:
        SourceError: It is no valid jinja, or nested too deep.
        UserError: To read it exceeds the limits.

    Attributes:
        tree: The parsed text.
    """

    def __init__(self, source: str, name: str, kind: str):
        self._source, self._name, self._kind = source, name, kind
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise SourceError(f"it has {len(source)} characters, more than {MAX_SOURCE_CHARACTERS}")
        environment = make_environment(kind)
        self._template: jinja2.Template | None = None
        try:
            self.tree = environment.parse(source)
            if kind == CHAT and takes_parts(self.tree):
                self._source = source = TEXT_PARTS + source
                self.tree = environment.parse(source)
            if is_linear(self.tree):
                self._template = environment.from_string(source)
        except RecursionError:
            raise SourceError("it is nested too deep") from None
        except (jinja2.TemplateError, ValueError) as error:  # a number of too many digits is a ValueError
            raise SourceError(describe(error)) from None
        if self._template is None:
            self._ask({}, [])

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for some values.

        Raises:
            RenderError: It does not take them.
            UserError: It exceeds the limits.
        """
        return next(self.render_all(values, [Variant({})]))

    def render_all(self, values: Mapping[str, Any], variants: Sequence[Variant]) -> Iterator[str]:
        """The texts for several variants of the values, in order; the errors of `render` come in their turn."""
        if self._template is not None:
            for variant in variants:
                yield self._render_here(self._template, variant.of(values))
            return
        remaining, text = iter(variants), ""
        while batch := list(islice(remaining, _MAX_REQUESTED)):
            for outcome, content in self._ask(values, batch):
                if outcome == "limit":
                    raise self._limit_error(content)
                if outcome == "error":
                    raise RenderError(content)
                _check_characters(content)
                text = text + content if outcome == "more" else content
                yield text

    def _render_here(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        try:
            text = template.render(values)
        except RENDER_ERRORS as error:
            raise RenderError(describe(error)) from None
        _check_characters(text)
        return text

    def _ask(self, values: Mapping[str, Any], variants: Sequence[Variant]) -> list[tuple[str, str]]:
        try:
            encoded = json.dumps(values, ensure_ascii=False)
        except (ValueError, RecursionError) as error:
            raise RenderError(f"its values cannot be passed on ({type(error).__name__})") from None
        seconds = MAX_SECONDS + _SECONDS_PER_BYTE * len(encoded) * len(variants)
        head = json.dumps(
            {
                "kind": self._kind,
                "source": self._source,
                "seconds": seconds,
                "variants": variants,
                "day": fixed_day(),
            },
            ensure_ascii=False,
        )
        try:
            answer = _WORKER.ask(f'{head[:-1]}, "values": {encoded}}}\n'.encode(errors="surrogatepass"))
        except _EndedError as error:
            if error.signal == signal.SIGPROF:
                raise self._limit_error(f"takes more than {seconds:.1f} s of computing") from None
            raise self._limit_error(f"ended the process that renders it: {error}") from None
        if "invalid" in answer:
            raise SourceError(answer["invalid"])
        if "limit" in answer:
            raise self._limit_error(answer["limit"])
        outcomes: list[tuple[str, str]] = answer["outcomes"]
        return outcomes

    def _limit_error(self, reason: str) -> UserError:
        return UserError(f"{self._name}: the template {reason}: {_REMEDY}.")


def _check_characters(text: str) -> None:
    r"""Literals such as "\ud800" and formats such as "%c" write half surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = ascii(text[error.start])[1:-1]
        raise RenderError(f"it writes {character}, half of a surrogate pair, which is no character") from None


class _EndedError(Exception):
    def __init__(self, code: int):
        self.signal = -code
        super().__init__(signal.Signals(-code).name if code < 0 else f"exit code {code}")


class _Worker:
    """This process' end of the one that renders; several threads may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            _EndedError: The process ended instead.
        """
        with self._lock:
            process = self._process or self._start()
            try:
                answer = _exchange(process, request)
            except OSError:  # the pipe is closed
                answer = b""
            except BaseException:  # an interruption: what is still to come would answer the next request
                self._end(process)
                raise
            if not answer.endswith(b"\n"):
                raise _EndedError(self._end(process))
        found: dict[str, Any] = json.loads(answer)
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        package_root = str(Path(__file__).resolve().parents[__name__.count(".")])
        path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {template_worker.__name__} import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,  # a forked child closes its copies, and must not write what this process has not yet
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C of the terminal is for the parent
            )
        except OSError as error:
            raise RunError(
                f"the process that renders templates cannot be started: {error.strerror}"
            ) from None
        return self._process

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        """Ends the process, if it has not ended itself; returns its exit code."""
        self._process = None
        _close_pipes(process)
        process.kill()
        return process.wait()

    def forget(self) -> None:
        """Leaves the process to the parent, in a child that was forked."""
        self._lock = threading.Lock()
        if self._process:
            _close_pipes(self._process)
            self._process.returncode = 0  # nothing to wait for
            self._process = None


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """Sends a request; returns the line that answers, or the part of it that came."""
    assert process.stdin and process.stdout
    rest = memoryview(request)
    while rest:
        rest = rest[process.stdin.write(rest) :]
    parts: list[bytes] = []
    while not parts or not parts[-1].endswith(b"\n"):
        if not select.select([process.stdout], [], [], _MAX_WAIT_SECONDS)[0]:
            break
        part = process.stdout.read(_CHUNK_BYTES)
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin and process.stdout
    process.stdin.close()
    process.stdout.close()


_WORKER = _Worker()
os.register_at_fork(after_in_child=_WORKER.forget)
