"""From an argument file and a command line to typed values: reading and converting, no judgement of values."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.argument_refusals import REFUSED, WITHOUT_EFFECT
from finetune.argument_settings import ALIASES, Setting, known_settings

_KEY_TOKEN = re.compile(r"--[A-Za-z_]")
_TRUE_WORDS = frozenset({"true", "1", "yes", "on", "t", "y"})
_FALSE_WORDS = frozenset({"false", "0", "no", "off", "f", "n"})
_NULL_WORDS = frozenset({"null", "none"})
_MAX_SHOWN_CHARS = 80
_TYPE_PHRASES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a finite number",
    "str": "a text",
    "list[str]": "a list of texts",
    "list[int]": "a list of whole numbers",
    "list[list[int]]": "a list of lists of whole numbers",
    "list[dict]": "a list of objects, as JSON on the command line,",
}


@dataclass
class Given:
    """What the user set.

    Attributes:
        values: Converted values by setting name; a null counts as not given.
        broken: Names whose value could not be converted: later checks leave them alone.
        extras: Known settings without a place in this project (``argument_refusals``), unconverted.
        faults: One line per fault found so far.
        lacks_file: True when an argument file was named but could not be read.
    """

    values: dict[str, Any] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    extras: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    lacks_file: bool = False


def read_given(argv: Sequence[str]) -> Given:
    """Read the argument file named first on the command line, if any, then the ``--key value`` pairs over it."""
    given = Given()
    positional, pairs = split_command_line(argv)
    if len(positional) > 1 or (positional and not positional[0].endswith(".json")):
        wrong = positional[1] if positional[0].endswith(".json") else positional[0]
        given.faults.append(
            f'"{wrong}" is neither a --key nor the argument file: write '
            "`finetune_generation.py ARGS.json --key value ...`, the file first and its name ending in .json"
        )
        given.lacks_file = not positional[0].endswith(".json")
        positional = [] if given.lacks_file else positional[:1]
    from_file = _read_file(Path(positional[0]), given.faults) if positional else {}
    given.lacks_file = given.lacks_file or from_file is None
    _take(from_file or {}, given, origin=f"in {positional[0]}" if positional else "", convert=convert_json)
    _take(pairs, given, origin="on the command line", convert=convert_words)
    return given


def split_command_line(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Split into words before the first key, and the words that follow each key; the last of equal keys counts."""
    positional: list[str] = []
    pairs: dict[str, list[str]] = {}
    words = positional
    for word in argv:
        if not _KEY_TOKEN.match(word):  # values may start with a minus sign
            words.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        words = [value] if equals else []
        pairs[key.replace("-", "_")] = words
    return positional, pairs


class _Object(dict[str, Any]):
    """A JSON object that remembers which keys it was given twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.duplicates = sorted({name for name in names if names.count(name) > 1})


def _read_file(path: Path, faults: list[str]) -> dict[str, Any] | None:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_Object)
    except FileNotFoundError:
        faults.append(f"argument file {path} does not exist (looked in {Path.cwd()}): check the path")
    except json.JSONDecodeError as error:
        faults.append(
            f"argument file {path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})"
        )
    except UnicodeDecodeError as error:
        faults.append(f"argument file {path} is not UTF-8 text (byte {error.start}): save it as UTF-8")
    except OSError as error:
        faults.append(f"argument file {path} cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        faults.append(f"argument file {path} cannot be read as JSON: {error}")
    else:
        if isinstance(parsed, _Object):
            faults.extend(f'"{key}" stands more than once in {path}: keep one' for key in parsed.duplicates)
            return parsed
        faults.append(f'argument file {path} holds no JSON object: it must look like {{"key": value, ...}}')
    return None


def _take(
    entries: dict[str, Any], given: Given, *, origin: str, convert: Callable[[Setting, Any], Any]
) -> None:
    """Add one source's entries to ``given``, over what an earlier source said."""
    settings = known_settings()
    spelled: dict[str, str] = {}
    for key, raw in entries.items():
        if key in REFUSED or key in WITHOUT_EFFECT:
            given.extras[key] = convert_extra(raw)
            continue
        name = ALIASES.get(key, key)
        if name not in settings:
            given.faults.append(describe_unknown(key, origin))
            continue
        try:
            value = convert(settings[name], raw)
        except ValueError as error:
            given.faults.append(f"{key} is {_show(raw)} {origin}: {error}")
            given.broken.add(name)
            continue
        given.broken.discard(name)
        if value is None and name not in spelled:
            given.values.pop(name, None)
        elif value is not None and name in spelled and given.values[name] != value:
            given.faults.append(
                f"{spelled[name]} and {key} are one setting, but {origin} they are "
                f"{_show(given.values[name])} and {_show(value)}: keep one of them"
            )
        elif value is not None:
            given.values[name] = value
            spelled[name] = key


_LAUNCHER_OPTIONS = frozenset(
    {"gpus", "devices", "nnodes", "nproc_per_node", "master", "rank", "host", "log_dir", "job_id", "ips"}
)


def describe_unknown(key: str, origin: str) -> str:
    """The fault line for a key that does not exist, with the nearest one that does."""
    from difflib import get_close_matches

    if key in _LAUNCHER_OPTIONS:
        return (
            f'"{key}" {origin} is an option of the launcher: put it before the script, as in '
            f"`python -m paddle.distributed.launch --{key} VALUE finetune_generation.py ARGS.json`"
        )
    nearest = get_close_matches(key.lower(), [*known_settings(), *ALIASES], n=1)
    remedy = f'did you mean "{nearest[0]}"?' if nearest else "see --help-all for every setting"
    return f'unknown setting "{key}" {origin}: {remedy}'


def convert_json(setting: Setting, value: Any) -> Any:
    """Convert a value from a JSON file to the setting's type; None for null.

    Raises:
        ValueError: With what is allowed, when the value does not fit.
    """
    if value is None:
        return None
    if setting.type.startswith("list["):
        return _convert_list(setting, value)
    return _convert_scalar(setting.type, value, setting)


def convert_words(setting: Setting, words: list[str]) -> Any:
    """Convert the words after a command-line key to the setting's type; none at all means true for a flag.

    Raises:
        ValueError: With what is allowed, when the words do not fit.
    """
    if setting.type == "bool" and not words:
        return True
    if len(words) == 1 and words[0].lower() in _NULL_WORDS and setting.name != "report_to":
        return None
    if setting.type.startswith("list["):
        if len(words) == 1 and words[0].startswith("["):
            try:
                return _convert_list(setting, json.loads(words[0]))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{_TYPE_PHRASES[setting.type]} as JSON, or separate words, is needed"
                ) from error
        return _convert_list(setting, words)
    if len(words) != 1:
        raise ValueError(f"one value is needed, not {len(words)}; {_phrase(setting)}")
    return _convert_scalar(setting.type, words[0], setting)


def convert_extra(raw: Any) -> Any:
    """Bring a value of a setting without a place here to the form the tables of off values use."""
    if isinstance(raw, list) and len(raw) <= 1 and all(isinstance(word, str) for word in raw):
        raw = raw[0] if raw else True
    if isinstance(raw, str):
        for words, value in ((_TRUE_WORDS - {"1"}, True), (_FALSE_WORDS - {"0"}, False), (_NULL_WORDS, None)):
            if raw.lower() in words:
                return value
        try:
            return float(raw)
        except ValueError:
            return raw
    return raw


def _convert_list(setting: Setting, value: Any) -> list[Any]:
    if isinstance(value, str) and setting.type == "list[str]":
        value = [value]
    if not isinstance(value, list):
        raise ValueError(_phrase(setting))
    if setting.type == "list[list[int]]":
        if not all(isinstance(row, list) for row in value):
            raise ValueError(_phrase(setting))
        return [[_convert_scalar("int", item, setting) for item in row] for row in value]
    if setting.type == "list[dict]":
        if not all(isinstance(item, dict) for item in value):
            raise ValueError(_phrase(setting))
        return [dict(item) for item in value]
    item_type = setting.type.removeprefix("list[").removesuffix("]")
    items = [_convert_scalar(item_type, item, setting) for item in value]
    return [] if setting.name == "report_to" and items == ["none"] else items


def _convert_scalar(type_name: str, value: Any, setting: Setting) -> Any:
    converted = _CONVERTERS[type_name](value)
    if setting.name == "sharding" and isinstance(value, bool):  # PaddleNLP's earlier form of the switch
        return "stage1" if value else ""
    if converted is None or (setting.choices and converted not in setting.choices):
        raise ValueError(_phrase(setting))
    return converted


def _phrase(setting: Setting) -> str:
    if setting.choices:
        return f"choose one of {', '.join(setting.choices)}"
    example = (
        ""
        if setting.type == "bool" or setting.default in (None, "", [])
        else f", for example {json.dumps(setting.default)}"
    )
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


def _to_str(value: Any) -> str | None:
    return value if isinstance(value, str) else None


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "bool": _to_bool,
    "int": _to_int,
    "float": _to_float,
    "str": _to_str,
}


def _show(raw: Any) -> str:
    if isinstance(raw, list) and len(raw) == 1 and isinstance(raw[0], str):
        raw = raw[0]
    elif raw == []:
        return "without a value"
    text = json.dumps(raw, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 3] + "..."
