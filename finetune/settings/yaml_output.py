"""Settings as YAML text, what each does in a comment above it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune.machine.language.choice import language
from finetune.machine.language.columns import wrap
from finetune.machine.language.translation import translate
from finetune.settings.registry import known_aliases, known_settings
from finetune.settings.yaml_text import YamlFault, parse_yaml

_WIDTH = 100


def format_yaml(values: Mapping[str, Any]) -> str:
    """Settings in their order; `parse_yaml` gives the same values again.

    Args:
        values: By name, plain values as JSON has them.
    """
    return "\n".join(line for key, value in values.items() for line in _format_entry(key, value))


def _format_entry(key: str, value: Any) -> list[str]:
    entry = f"{_format_text(key)}: {_format_value(value)}\n"
    setting = known_settings().get(known_aliases().get(key, key))
    if setting is None:
        return [entry]
    text = setting.help_zh if language() == "zh" and setting.help_zh else translate(setting.help)
    return [*(f"# {line}" for line in wrap(text, _WIDTH - 2).split("\n")), entry]


def _format_value(value: Any) -> str:
    """A value on one line, in the brackets of JSON where it is a list or a mapping."""
    return _format_text(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _format_text(text: str) -> str:
    """A text without quotes where it is read back as it is."""
    line = f"{text}: {text}"
    try:
        is_plain = "\n" not in text and parse_yaml(line)[0] == {text: text}
    except YamlFault:
        is_plain = False
    return text if is_plain else json.dumps(text)
