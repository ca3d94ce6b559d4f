"""An Ollama Modelfile for a GGUF file: template, system text and the tokens at which an answer ends.

Ollama's templates are Go's. Built-in conversation formats are written as one; a template that a user or a publisher
wrote in jinja is not translated: it is in the GGUF file, and the Modelfile says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from finetune.data.templates.pieces import parse_pattern
from finetune.families.chat_format import ChatFormat

_QUOTES = '"""'


def write_modelfile(
    weights: str, *, template: str | None, notes: Sequence[str], system: str | None, stops: Sequence[str]
) -> str:
    """The text of a Modelfile.

    Args:
        weights: Name of the GGUF file beside it.
        template: Go's template; None leaves it to Ollama.
        notes: Comments.
        system: System text of conversations that have none.
        stops: Texts of the tokens that end an answer.
    """
    lines = [f"FROM ./{weights}", *(f"# {note}" for note in notes)]
    if template is not None:
        lines.append(f"TEMPLATE {_QUOTES}{template}{_QUOTES}")
    if system:
        lines.append(f"SYSTEM {_QUOTES}{system}{_QUOTES}")
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in dict.fromkeys(stops)]
    return "\n".join(lines) + "\n"


def fits_quotes(text: str) -> bool:
    """Whether a text can stand between a Modelfile's triple quotes."""
    return _QUOTES not in text and not text.endswith('"')


def go_template(chat: ChatFormat, *, bos: str, eos: str) -> str | None:
    """A format as a template of Ollama.

    Args:
        chat: The format.
        bos: Text of the token that Ollama puts in front of every prompt, and that the template leaves out there; ""
            for none.
        eos: Text of the token that ends an answer where the format has no end of its own.

    Returns:
        The template; None where the format counts rounds, which Go's templates cannot.
    """
    texts = (chat.user, chat.answer, chat.tool or "", chat.system, chat.opening, chat.end + chat.after)
    if "{round}" in chat.user or any("{{" in text for text in texts):
        return None
    opening, user, tool = chat.opening, chat.user, chat.user if chat.tool is None else chat.tool
    opens_user = bool(bos) and not opening and user.startswith(bos)
    opening = opening.removeprefix(bos)
    in_user = "{system}" in user
    system = "{{ if $.System }}" + _filled(chat.system, "{{ $.System }}") + "{{ end }}"
    once = "{{ if not $begun }}" + system + "{{ end }}" if in_user else ""
    asked, returned = (_filled(pattern, "{{ .Content }}", once) for pattern in (user, tool))
    if opens_user:
        later = "{{ if $begun }}" + bos + "{{ end }}"
        asked, returned = (
            later + text.removeprefix(bos) if text.startswith(bos) else text for text in (asked, returned)
        )
    answered = _filled(chat.answer, "{{ .Content }}")
    end = chat.end or ("" if chat.ends_with_next else eos)
    # The last message, if it is an answer, is one that the model goes on with.
    ended = "{{ if gt (len (slice $.Messages $i)) 1 }}" + end + chat.after + "{{ end }}"
    return "".join((
        opening,
        "" if in_user else system,
        "{{ $begun := false }}{{ range $i, $_ := .Messages }}",
        '{{ if eq .Role "user" }}', asked, "{{ $begun = true }}",
        '{{ else if eq .Role "tool" }}', returned, "{{ $begun = true }}",
        '{{ else if eq .Role "assistant" }}', answered, ended,
        "{{ end }}{{ end }}",
    ))  # fmt: skip


def _filled(pattern: str, content: str, system: str = "") -> str:
    """A pattern of `ChatFormat` with its places filled."""
    parts = []
    for kind, value in parse_pattern(pattern, ("content", "system"), ()):
        parts.append(value if kind != "data" else {"content": content, "system": system}[value])
    return "".join(parts)
