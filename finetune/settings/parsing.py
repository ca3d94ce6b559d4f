"""From an argument file and a command line to typed values: reading and converting, no judgement of values."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from finetune.machine.command_names import TRAIN, launched_name, usage_name
from finetune.machine.language.translation import keep_values
from finetune.settings.argument_file import ENDINGS, FileEntries, is_argument_file, read_argument_file
from finetune.settings.conversion import convert_json, convert_words, show
from finetune.settings.records import Setting
from finetune.settings.registry import foreign_settings, known_aliases, known_settings
from finetune.settings.synonyms import WINNING_NAMES, find_method_fault, known_synonyms, translate

_KEY_TOKEN = re.compile(r"--[A-Za-z_]")
_LAUNCHER_OPTIONS = frozenset(
    ["gpus", "devices", "nnodes", "nproc_per_node", "master", "rank", "host", "log_dir", "job_id", "ips"]
)


@dataclass
class GivenSettings:
    """What the user set; a null counts as not given."""

    values: dict[str, Any] = field(default_factory=dict)  # converted, by setting name
    broken: set[str] = field(default_factory=set)  # names whose value could not be converted
    foreign: dict[str, Any] = field(default_factory=dict)  # of settings without a place in this project
    raw: dict[str, Any] = field(default_factory=dict)  # every key, as it was written
    translated: dict[str, str] = field(default_factory=dict)  # key of another tool -> how it is read
    faults: list[str] = field(default_factory=list)  # one line per fault found so far
    is_other_method: bool = False  # the settings are those of a method that this command does not have
    file_name: str = ""  # of the argument file
    lacks_file: bool = False  # an argument file was named but could not be read


def read_given(argv: Sequence[str], overrides: Mapping[str, Any] = MappingProxyType({})) -> GivenSettings:
    """Reads the argument file named first on the command line, if any, then the ``--key value`` pairs over it.

    Args:
        argv: The words after the program's name.
        overrides: Values as a file has them, from a call, over both.
    """
    given = GivenSettings()
    positional, pairs = split_command_line(argv)
    named = bool(positional) and is_argument_file(positional[0])
    if stray := positional[named : named + 1]:
        given.faults.append(
            f'"{stray[0]}" is neither a --key nor the argument file: write '
            f"`{usage_name(TRAIN)} ARGS.json --key value ...`, the file first and its name ending in "
            f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        )
    given.lacks_file = bool(stray) and not named
    if named:
        given.file_name = Path(positional[0]).name
        from_file = read_argument_file(Path(positional[0]), given.faults)
        given.lacks_file = from_file is None
        _take(from_file or FileEntries(), given, origin=f"in {positional[0]}", convert=convert_json)
    _take(FileEntries(dict(pairs)), given, origin="on the command line", convert=convert_words)
    _take(FileEntries(dict(overrides)), given, origin="in the call", convert=convert_json)
    where = f"in {positional[0]}" if named else "in the call" if overrides else "on the command line"
    if fault := find_method_fault(given.raw, where):
        given.faults = [fault]  # the rest of its settings would be named for nothing
        given.is_other_method = True
    return given


def split_command_line(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Splits into words before the first key, and the words that follow each key; the last of equal keys counts."""
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


def _take(
    entries: FileEntries, given: GivenSettings, *, origin: str, convert: Callable[[Setting, Any], Any]
) -> None:
    """Adds one source's entries to ``given``, over what an earlier source said."""
    source = _Source(given, origin, convert, entries.lines)
    keep_values(entries.values)
    for key, raw in entries.values.items():
        given.raw[key] = raw
        try:
            if key in foreign_settings():
                given.foreign[key] = convert(foreign_settings()[key], raw)
                continue
            pairs = list(translate(key, raw))
        except ValueError as error:
            given.faults.append(f"{key} is {show(key, raw)} {source.place(key)}: {error}")
            continue
        for name, value in pairs:
            source.take(key, known_aliases().get(name, name), value)


@dataclass
class _Source:
    """One source of settings: a file, or the command line."""

    given: GivenSettings
    origin: str
    convert: Callable[[Setting, Any], Any]
    lines: dict[str, int]  # of the keys, where they are known
    keys: dict[str, str] = field(default_factory=dict)  # setting -> the key that it was written under

    def place(self, key: str) -> str:
        """Where a key stands: "in args.yaml, line 3"."""
        return f"{self.origin}, line {self.lines[key]}" if key in self.lines else self.origin

    def take(self, key: str, name: str, raw: Any) -> None:
        """Converts a value and keeps it, or notes why it cannot be used.

        Args:
            key: The key as it was written.
            name: The setting that it stands for.
            raw: The value as it was written, or as the table of synonyms has it.
        """
        given = self.given
        setting = known_settings().get(name)
        if setting is None:
            given.faults.append(describe_unknown(key, self.place(key)))
            return
        try:
            value = (self.convert if raw is given.raw[key] else convert_json)(setting, raw)
        except ValueError as error:
            given.faults.append(f"{key} is {show(key, raw)} {self.place(key)}: {error}")
            given.broken.add(name)
            return
        given.broken.discard(name)
        if value is None:
            if name not in self.keys:
                given.values.pop(name, None)
        elif name not in self.keys or given.values[name] == value or key in WINNING_NAMES:
            given.values[name] = value
            self.keys[name] = key
            if key in known_synonyms() and (key != name or raw is not given.raw[key]):
                given.translated[key] = f"{key} as {name} {show(name, value)}"
        elif self.keys[name] not in WINNING_NAMES:
            given.faults.append(
                f"{self.keys[name]} and {key} are one setting, but {self.place(key)} they are "
                f"{show(name, given.values[name])} and {show(name, value)}: keep one of them"
            )


def describe_unknown(key: str, origin: str) -> str:
    """The fault line for a key that does not exist, with the nearest one that does."""
    from difflib import get_close_matches

    if key in _LAUNCHER_OPTIONS:
        return (
            f'"{key}" {origin} is an option of the launcher: put it before the script, as in '
            f"`python -m paddle.distributed.launch --{key} VALUE {launched_name(TRAIN)} ARGS.json`"
        )
    # A lower cutoff would answer "model" with "model_name", which is another setting.
    names = [*known_settings(), *known_aliases(), *known_synonyms()]
    nearest = get_close_matches(key.lower(), names, n=1, cutoff=0.75)
    remedy = f'did you mean "{nearest[0]}"?' if nearest else "see --help-all for every setting"
    return f'unknown setting "{key}" {origin}: {remedy}'
