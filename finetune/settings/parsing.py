"""From an argument file and a command line to typed values: reading and converting, no judgement of values."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.settings.conversion import convert_json, convert_words, show
from finetune.settings.records import Setting
from finetune.settings.registry import foreign_settings, known_aliases, known_settings

_KEY_TOKEN = re.compile(r"--[A-Za-z_]")
_LAUNCHER_OPTIONS = frozenset(
    ["gpus", "devices", "nnodes", "nproc_per_node", "master", "rank", "host", "log_dir", "job_id", "ips"]
)


@dataclass
class Given:
    """What the user set; a null counts as not given."""

    values: dict[str, Any] = field(default_factory=dict)  # converted, by setting name
    broken: set[str] = field(default_factory=set)  # names whose value could not be converted
    foreign: dict[str, Any] = field(default_factory=dict)  # of settings without a place in this project
    faults: list[str] = field(default_factory=list)  # one line per fault found so far
    lacks_file: bool = False  # an argument file was named but could not be read


def read_given(argv: Sequence[str]) -> Given:
    """Read the argument file named first on the command line, if any, then the ``--key value`` pairs over it."""
    given = Given()
    positional, pairs = split_command_line(argv)
    named = bool(positional) and positional[0].endswith(".json")
    if stray := positional[named : named + 1]:
        given.faults.append(
            f'"{stray[0]}" is neither a --key nor the argument file: write '
            "`finetune_generation.py ARGS.json --key value ...`, the file first and its name ending in .json"
        )
    given.lacks_file = bool(stray) and not named
    if named:
        from_file = _read_file(Path(positional[0]), given.faults)
        given.lacks_file = from_file is None
        _take(from_file or {}, given, origin=f"in {positional[0]}", convert=convert_json)
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


def _read_file(path: Path, faults: list[str]) -> dict[str, Any] | None:
    file = f"argument file {path}"
    objects: list[list[tuple[str, Any]]] = []  # the outermost is read last

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        objects.append(pairs)
        return dict(pairs)

    try:
        parsed = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=keep)
    except FileNotFoundError:
        fault = f"{file} does not exist (looked in {Path.cwd()}): check the path"
    except json.JSONDecodeError as error:
        fault = f"{file}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})"
    except UnicodeDecodeError as error:
        fault = f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8"
    except OSError as error:
        fault = f"{file} cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        fault = f"{file} cannot be read as JSON: {error}"
    else:
        if isinstance(parsed, dict):
            keys = [key for key, _ in objects[-1]]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            faults.extend(f'"{key}" stands more than once in {path}: keep one' for key in twice)
            return parsed
        fault = f'{file} holds no JSON object: it must look like {{"key": value, ...}}'
    faults.append(fault)
    return None


def _take(
    entries: dict[str, Any], given: Given, *, origin: str, convert: Callable[[Setting, Any], Any]
) -> None:
    """Add one source's entries to ``given``, over what an earlier source said."""
    spelled: dict[str, str] = {}
    for key, raw in entries.items():
        if key in foreign_settings():
            given.foreign[key] = convert(foreign_settings()[key], raw)
            continue
        name = known_aliases().get(key, key)
        if name not in known_settings():
            given.faults.append(describe_unknown(key, origin))
            continue
        try:
            value = convert(known_settings()[name], raw)
        except ValueError as error:
            given.faults.append(f"{key} is {show(raw)} {origin}: {error}")
            given.broken.add(name)
            continue
        given.broken.discard(name)
        if value is None and name not in spelled:
            given.values.pop(name, None)
        elif value is not None and name in spelled and given.values[name] != value:
            given.faults.append(
                f"{spelled[name]} and {key} are one setting, but {origin} they are "
                f"{show(given.values[name])} and {show(value)}: keep one of them"
            )
        elif value is not None:
            given.values[name] = value
            spelled[name] = key


def describe_unknown(key: str, origin: str) -> str:
    """The fault line for a key that does not exist, with the nearest one that does."""
    from difflib import get_close_matches

    if key in _LAUNCHER_OPTIONS:
        return (
            f'"{key}" {origin} is an option of the launcher: put it before the script, as in '
            f"`python -m paddle.distributed.launch --{key} VALUE finetune_generation.py ARGS.json`"
        )
    nearest = get_close_matches(key.lower(), [*known_settings(), *known_aliases()], n=1)
    remedy = f'did you mean "{nearest[0]}"?' if nearest else "see --help-all for every setting"
    return f'unknown setting "{key}" {origin}: {remedy}'
