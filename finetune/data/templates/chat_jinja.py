"""The built-in conversation formats as jinja text, the form in which transformers keeps chat templates.

Functions that may be called are not written; a user's message always opens the answer, as in training.
"""

from __future__ import annotations

import json

from finetune.data.templates.jinja_forms import SWITCH
from finetune.data.templates.pieces import parse_pattern
from finetune.families.chat_format import ChatFormat
from finetune.families.family import TokenizerFacts

_COUNT_USERS = (
    "{% for message in messages %}{% if message['role'] in ('user', 'tool') %}{% set ns.users = ns.users + 1 %}"
    "{% endif %}{% endfor %}"
)
_BEGINNINGS = ("<s>", "<|begin_of_text|>", "<bos>")


def write_jinja(chat: ChatFormat, tokenizer: TokenizerFacts) -> str:
    """A format as one jinja text that takes ``messages``, ``bos_token`` and ``eos_token``.

    Args:
        chat: The format.
        tokenizer: How the model's sequences are framed; left out is a beginning or end that the format
            writes itself.
    """
    in_user = "{system}" in chat.user
    opening = _literal(chat.opening)
    if not (chat.opening or chat.user).startswith(_BEGINNINGS):
        opening = "".join(map(_token, tokenizer.prefix)) + opening
    texts = {whose: "message['content']" + " | trim" * (whose in chat.trims) for whose in ("user", "answer")}
    given = "ns.system" + " | trim" * ("system" in chat.trims)
    system = f"{{% if ns.system %}}{_written(chat.system, content=given)}{{% endif %}}"
    once = f"{system}{{% set ns.system = '' %}}"
    end = _literal(chat.end) if chat.end or chat.ends_with_next else _token(tokenizer.end_of_answer)
    end = "" if tokenizer.answer_prefix else end  # then it stands behind the last answer only
    tool = chat.user if chat.tool is None else chat.tool
    user = _written(chat.user, content=texts["user"], system=once)
    if chat.only_user is not None:
        only = _written(chat.only_user, content=texts["user"], system=once)
        user = f"{{% if ns.users == 1 %}}{only}{{% else %}}{user}{{% endif %}}"
    return "".join((
        f"{{% set ns = namespace(round={chat.first_round - 1}, users=0, system={json.dumps(chat.default_system or '')}) %}}",
        "{% if messages and messages[0]['role'] == 'system' %}{% set ns.system = messages[0]['content'] %}{% endif %}",
        _COUNT_USERS if chat.only_user is not None else "",
        opening,
        "" if in_user else system,
        "{% for message in messages %}{% if message['role'] == 'user' %}{% set ns.round = ns.round + 1 %}",
        user,
        "{% elif message['role'] == 'tool' %}",
        _written(tool, content=texts["user"], system=once),
        "{% elif message['role'] == 'assistant' %}",
        _before_last_answer(tokenizer),
        _written(chat.answer, content=texts["answer"]),
        end,
        _literal(chat.after),
        "{% endif %}{% endfor %}",
        _before_next_answer(tokenizer),
    ))  # fmt: skip


def _before_last_answer(tokenizer: TokenizerFacts) -> str:
    """What stands in front of an answer that ends the messages."""
    tokens = "".join(map(_token, tokenizer.answer_prefix))
    return f"{{% if loop.last %}}{tokens}{{% endif %}}" if tokens else ""


def _before_next_answer(tokenizer: TokenizerFacts) -> str:
    """What stands behind the messages where an answer is to follow."""
    tokens = "".join(map(_token, tokenizer.answer_prefix))
    return f"{{% if messages[-1]['role'] != 'assistant' %}}{tokens}{{% endif %}}" if tokens else ""


def with_system(source: str, system: str | None) -> str:
    """A jinja template that takes a system text for conversations that have none.

    Args:
        source: The template.
        system: The text; None leaves the template as it is.
    """
    if not system:
        return source
    message = f"[{{'role': 'system', 'content': {json.dumps(system)}}}]"
    return (
        "{% if messages and messages[0]['role'] != 'system' %}"
        f"{{% set messages = {message} + messages %}}"
        "{% endif %}" + source
    )


def with_switch(source: str, enable_thinking: bool | None) -> str:
    """A jinja template that takes a switch of thoughts where whoever renders it says nothing of it.

    Args:
        source: The template.
        enable_thinking: The switch; None leaves the template as it is.
    """
    if enable_thinking is None:
        return source
    value = json.dumps(enable_thinking)
    return f"{{% if {SWITCH} is not defined %}}{{% set {SWITCH} = {value} %}}{{% endif %}}" + source


def _written(pattern: str, *, content: str, system: str = "") -> str:
    """A pattern of `ChatFormat` as jinja."""
    parts = []
    for kind, value in parse_pattern(pattern, ("content", "round", "system"), ()):
        if kind != "data":
            parts.append(_literal(value))
        elif value == "system":
            parts.append(system)
        else:
            parts.append(f"{{{{ {content if value == 'content' else 'ns.round'} }}}}")
    return "".join(parts)


def _token(name: str) -> str:
    """A token by its role or its text."""
    return f"{{{{ {name}_token }}}}" if name in ("bos", "eos", "pad", "unk") else _literal(name)


def _literal(text: str) -> str:
    # As an expression: transformers takes line ends behind tags away.
    return f"{{{{ {json.dumps(text)} }}}}" if text else ""
