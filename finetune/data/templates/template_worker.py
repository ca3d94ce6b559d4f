"""The process in which templates are rendered that could go on without end: it may use so much time and memory.

One line of JSON asks, one answers::

    {"kind": "chat", "source": "{% for ...", "values": {...}, "variants": [[{...}, 3], ...], "seconds": 1.2,
     "day": null}
    {"invalid": "line 3: unexpected '}'"}
    {"limit": "needs more than 1024 MB of memory"}                      # to read the template alone
    {"outcomes": [["text", "<s>..."], ["more", "..."], ["error", "no system"], ["limit", "writes ..."]]}

"more" is what a text adds to the one before, which it begins with, as that of a longer conversation does.

A request that computes for longer than its seconds ends the process by the signal of a timer, whatever it is in the
middle of; the parent sees that and starts another. Nothing here needs more than jinja, so that starting takes about
0.1 s.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2

from finetune.data.templates.jinja_environment import describe, make_environment
from finetune.data.templates.template_clock import set_day
from finetune.machine.stop_signals import STOP_SIGNALS

MAX_MEMORY_BYTES = 2**30
"""Of addresses, so that a process without limit on memory is not asked for it."""
MAX_TEXT_CHARACTERS = 2_000_000
"""Of a rendered text, beside a multiple of what went into it."""
_GROWTH = 10
_OUT_OF_MEMORY = f"needs more than {MAX_MEMORY_BYTES // 2**20} MB of memory"
_MAX_TEMPLATES = 16


class Variant(NamedTuple):
    """What is other than the values that several texts share.

    Attributes:
        changes: Values by name.
        num_messages: How many of the messages there are; None for all.
    """

    changes: Mapping[str, Any]
    num_messages: int | None = None

    def of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of this text."""
        own = {**values, **self.changes}
        if self.num_messages is not None:
            own["messages"] = own["messages"][: self.num_messages]
        return own


class _Templates:
    """Compiled templates by kind and text; compiling alone may take all the time and memory there is."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], jinja2.Template] = {}

    def get(self, kind: str, source: str) -> jinja2.Template:
        found = self._known.get((kind, source))
        if found is None:
            if len(self._known) >= _MAX_TEMPLATES:
                self._known.clear()
            found = self._known[kind, source] = make_environment(kind).from_string(source)
        return found


def main() -> None:
    """Answers until the parent closes the pipe."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the parent ends this process with the pipe
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    least = MAX_MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MAX_MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (least, most))
    templates = _Templates()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        content = json.dumps(_answer(templates, request, len(line)), ensure_ascii=False)
        answer = content.encode(errors="surrogatepass")
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


def _answer(templates: _Templates, request: dict[str, Any], num_bytes: int) -> dict[str, Any]:
    set_day(request["day"])
    try:
        template = templates.get(request["kind"], request["source"])
    except MemoryError:
        return {"limit": _OUT_OF_MEMORY}
    except RecursionError:
        return {"invalid": "it is nested too deep"}
    except Exception as error:
        return {"invalid": describe(error)}
    max_characters = MAX_TEXT_CHARACTERS + _GROWTH * num_bytes
    outcomes = [
        _render(template, Variant(*variant).of(request["values"]), max_characters)
        for variant in request["variants"]
    ]
    return {"outcomes": [_shorten(*pair) for pair in zip([None, *outcomes], outcomes, strict=False)]}


def _shorten(before: tuple[str, str] | None, outcome: tuple[str, str]) -> tuple[str, str]:
    """Leaves out of a text what the one before has."""
    if before is None or not before[0] == outcome[0] == "text" or not outcome[1].startswith(before[1]):
        return outcome
    return "more", outcome[1][len(before[1]) :]


def _render(template: jinja2.Template, values: dict[str, Any], max_characters: int) -> tuple[str, str]:
    try:
        text = template.render(values)
    except MemoryError:
        return "limit", _OUT_OF_MEMORY
    except RecursionError:
        return "limit", "calls itself too often"
    except Exception as error:
        return "error", describe(error)
    if len(text) > max_characters:
        return "limit", f"writes {len(text)} characters, more than {max_characters}"
    return "text", text
