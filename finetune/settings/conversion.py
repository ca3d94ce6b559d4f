"""Values from a file or a command line, converted to the type of their setting."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

from finetune.settings.records import Setting

_TRUE_WORDS = frozenset({"true", "1", "yes", "on", "t", "y"})
_FALSE_WORDS = frozenset({"false", "0", "no", "off", "f", "n"})
_NULL_WORDS = frozenset({"null", "none"})
_MAX_SHOWN_CHARS = 80
# Of ours and of other tools: hub_token, wandb_api_key, ...
_SECRET_NAME = re.compile(r"(token|key|secret|passw(or)?d|credentials?|proxy)$", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")
CHINESE = re.compile("[\u3400-\u9fff\uf900-\ufaff]")
PATH_LISTS = ("dataset_name_or_path", "eval_dataset")
"""Settings in which several paths are one text with commas between, or a list."""

_TYPE_PHRASES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a finite number",
    "str": "a text",
    "list[str]": "a list of texts",
    "list[int]": "a list of whole numbers",
    "list[list[int]]": "a list of lists of whole numbers",
    "list[dict]": "a list of objects, as JSON on the command line,",
    "dict": "an object, as JSON on the command line,",
}


def convert_json(setting: Setting, value: Any) -> Any:
    """Converts a value from a JSON file to the setting's type; None for null.

    Raises:
        ValueError: With what is allowed, when the value does not fit.
    """
    if value is None:
        return None
    check_text(value)
    if setting.group == "foreign":
        return None if value in ([], {}) else _convert_foreign(value)
    if setting.choices and setting.type == "str":  # TRL writes one word as a list
        value = take_word(value) or value
    if setting.is_pair_of_names and isinstance(value, list):
        return _join_names(value)
    if (
        setting.name in PATH_LISTS
        and isinstance(value, list)
        and all(isinstance(each, str) for each in value)
    ):
        value = ",".join(value)
    converted = _convert(setting, setting.type, value)
    return [] if setting.name == "report_to" and converted == ["none"] else converted


def convert_words(setting: Setting, words: list[str]) -> Any:
    """Converts the words after a command-line key to the setting's type; none at all means true for a flag.

    Raises:
        ValueError: With what is allowed, when the words do not fit.
    """
    if setting.group == "foreign":
        return _convert_foreign(words)
    if setting.type == "bool" and not words:
        return True
    if len(words) == 1 and words[0].lower() in _NULL_WORDS and setting.name != "report_to":
        return None
    if not setting.type.startswith("list["):
        if setting.is_pair_of_names and len(words) == 2:
            return convert_json(setting, words)
        if len(words) != 1 and setting.name not in PATH_LISTS:
            raise ValueError(f"one value is needed, not {len(words)}; {_describe_allowed(setting)}")
        return convert_json(setting, words[0] if len(words) == 1 else words)
    if len(words) != 1 or not words[0].startswith("["):
        return convert_json(setting, words)
    try:
        value = json.loads(words[0])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_TYPE_PHRASES[setting.type]} as JSON, or separate words, is needed") from error
    return convert_json(setting, value)


def check_text(value: Any) -> None:
    """Refuses characters that no file name and no file of text may hold, wherever they stand in a value.

    Raises:
        ValueError: With the character.
    """
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("it holds a null character (\\u0000): remove it")
        if broken := _SURROGATE.search(value):
            raise ValueError(
                f"it holds half a character (\\u{ord(broken[0]):04x}), no text in UTF-8: correct it"
            )
    elif isinstance(value, (list, dict)):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            check_text(item)


def show(key: str, raw: Any) -> str:
    """The value as it was given, cut where it is long; nothing of what may be a password.

    Args:
        key: What it was given for.
        raw: The value, or the words after a key of the command line.
    """
    if _SECRET_NAME.search(key):
        return "(not shown)"
    if isinstance(raw, list) and len(raw) == 1 and isinstance(raw[0], str):
        raw = raw[0]
    elif raw == []:
        return "without a value"
    text = _SURROGATE.sub(
        lambda broken: f"\\u{ord(broken[0]):04x}", json.dumps(raw, ensure_ascii=False, default=str)
    )
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 3] + "..."


def _convert(setting: Setting, type_name: str, value: Any) -> Any:
    if type_name.startswith("list["):
        if isinstance(value, str) and type_name == "list[str]":
            value = [value]
        if not isinstance(value, list):
            raise ValueError(_describe_allowed(setting))
        item_type = type_name.removeprefix("list[").removesuffix("]")
        return [_convert(setting, item_type, item) for item in value]
    if setting.name == "sharding" and isinstance(value, bool):  # PaddleNLP's earlier form of the switch
        return "stage1" if value else ""
    converted = _CONVERTERS[type_name](value)
    if converted is None or not setting.is_choice(converted):
        is_unquoted = type_name == "str" and isinstance(value, (bool, int, float)) and not setting.choices
        raise ValueError(_describe_allowed(setting) + (", in quotes" if is_unquoted else ""))
    return converted


def _join_names(names: list[Any]) -> str:
    """The Chinese and the English name of a list, as ms-swift writes them, in the form of one text."""
    if len(names) == 1 and isinstance(names[0], str):
        return names[0]
    if len(names) == 2 and all(isinstance(name, str) for name in names):
        chinese, english = (name.strip() for name in names)
        if chinese == english:
            return str(chinese)
        if CHINESE.search(chinese) and " " not in chinese and not CHINESE.search(english):
            return f"{chinese} {english}"
    raise ValueError(
        'one name, or a Chinese one without blanks and an English one are needed: ["小桨", "Paddy"]'
    )


def _convert_foreign(raw: Any) -> Any:
    """Brings a value to the form that the records of foreign settings use."""
    raw = take_word(raw)
    if not isinstance(raw, str):
        return raw
    if (number := _to_float(raw)) is not None:
        return int(number) if number.is_integer() else number
    return None if raw.lower() in _NULL_WORDS else raw if (flag := _to_bool(raw)) is None else flag


def take_word(raw: Any) -> Any:
    """The one word behind a key of the command line, true behind a key without any; other values as they are."""
    if isinstance(raw, list) and len(raw) <= 1 and all(isinstance(word, str) for word in raw):
        return raw[0] if raw else True
    return raw


def _describe_allowed(setting: Setting) -> str:
    if setting.choices:
        return f"choose one of {', '.join(setting.choices)}"
    lacks_example = setting.type == "bool" or setting.default in (None, "", [])
    example = "" if lacks_example else f", for example {json.dumps(setting.default)}"
    return f"{_TYPE_PHRASES[setting.type]} is needed{example}"


def _to_bool(value: Any) -> bool | None:
    if isinstance(value, str):
        word = value.strip().lower()
        return True if word in _TRUE_WORDS else False if word in _FALSE_WORDS else None
    # PaddleNLP's parser takes 0 and 1 for flags in a file, and existing files use them.
    return bool(value) if isinstance(value, bool) or value in (0, 1) else None


def _to_int(value: Any) -> int | None:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = _to_float(value)
    if isinstance(value, float) and value.is_integer():  # 3.0 and "1e3" mean whole numbers
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _to_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _to_dict(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return dict(value) if isinstance(value, dict) else None


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "bool": _to_bool,
    "int": _to_int,
    "float": _to_float,
    "str": lambda value: value if isinstance(value, str) else None,
    "dict": _to_dict,
}
