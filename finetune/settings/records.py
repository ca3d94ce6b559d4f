"""The record of a setting: everything that is known about one key of an argument file."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

# Who reads a setting, beside this program itself.
MODEL_CONFIG, PADDLENLP, LAYOUT = "model configuration", "PaddleNLP's training arguments", "parallel layout"


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting may hold."""

    low: float
    high: float
    low_allowed: bool = True  # low itself is
    high_allowed: bool = True  # high itself is
    is_interval: bool = False  # both bounds mean something; else high only keeps out slips of the pen

    def find_fault(self, name: str, value: float) -> str | None:
        """Why the number cannot be used, as one line; None when it can."""
        is_low = value < self.low or (value == self.low and not self.low_allowed)
        if not is_low and (value < self.high or (value == self.high and self.high_allowed)):
            return None
        if self.is_interval:
            start = f"from {self.low}" if self.low_allowed else f"above {self.low}"
            allowed = f"{start} {'up to' if self.high_allowed else 'to below'} {self.high}"
        elif is_low:
            allowed = f"at least {self.low}" if self.low_allowed else f"more than {self.low}"
        else:
            allowed = f"at most {self.high}"
        return f"{name} is {value}: it must be {allowed}"


POSITIVE = Range(0, 10**6, low_allowed=False)
SHARE_BELOW_ONE = Range(0, 1, high_allowed=False, is_interval=True)
TOKENS = Range(1, 2**24)
COUNT = Range(1, 10**9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One key of an argument file; what an attribute says stands beside it."""

    # fmt: off
    name: str                           # the key
    group: str                          # of Arguments, or "foreign" for a setting without a place here
    type: str                           # bool, int, float, str, a list[...] of these, list[dict]; any if foreign
    default: Any                        # value when the key is absent or null
    help: str                           # one or two sentences
    help_zh: str = ""                   # the same in Chinese; PaddleNLP's settings have none
    why: str = ""                       # why it differs from what one would expect, for those who maintain it
    choices: tuple[str, ...] = ()       # the values allowed, where they can be listed; _N at an end: any number from 1 on
    range: Range | None = None          # the numbers allowed
    words: tuple[str, ...] = ()         # the words allowed in a text of several
    aliases: tuple[str, ...] = ()       # other names in files and on the command line
    may_change: bool = False            # a continued run keeps its curve with another value
    may_grow: bool = False              # a finished run continues with a larger value
    readers: tuple[str, ...] = ()       # who reads it: the names above
    common: bool = True                 # shown by --help, not by --help-all alone
    is_pair_of_names: bool = False      # a list of a Chinese and an English name is one text
    is_path: bool = False               # may be a path, in which ~ is expanded
    is_secret: bool = False             # kept out of every file that is written
    gpu_only: bool = False              # turned off on CPU
    is_resolved: bool = False           # settled here, so PaddleNLP is told even when nobody gave it
    working: tuple[Any, ...] | None = None  # the values that work here; None: all
    instead: str = ""                   # what to do about the others
    ignored: str = ""                   # why it changes nothing here; empty where it does
    quiet: bool = False                 # ignored without a warning, since many files carry it
    quiet_value: Any = None             # value of an ignored setting that asks for what is done anyway
    # fmt: on

    @property
    def choice_pattern(self) -> str | None:
        """A regular expression for the values allowed, where one of them has a number; None otherwise."""
        if not any(each.endswith("_N") for each in self.choices):
            return None
        forms = (re.sub(r"_N$", r"_[1-9][0-9]{0,2}", re.escape(each)) for each in self.choices)
        return f"^({'|'.join(forms)})$"

    def is_choice(self, value: Any) -> bool:
        """Whether a value is one of the choices, where there are any."""
        if pattern := self.choice_pattern:
            return isinstance(value, str) and re.fullmatch(pattern, value) is not None
        return not self.choices or value in self.choices

    def find_faults(self, value: Any) -> Iterator[str]:
        """What is wrong with a value in itself: a number out of range, an unknown word, a refused value."""
        if (
            self.range is not None
            and value is not None
            and (fault := self.range.find_fault(self.name, value))
        ):
            yield fault
        given = re.split(r"[\s,]+", value or "") if self.words else []
        if unknown := ", ".join(f'"{word}"' for word in given if word and word not in self.words):
            known = ", ".join(sorted(self.words))
            yield f'{self.name} is "{value}", of which {unknown} is not known: choose from {known}'
        if self.working is None or value is None:
            return
        if any(value is each or (value == each and value is not True) for each in self.working):
            return  # 1 does not mean true here
        shown, remedy = repr(value), self.instead
        if self.group in ("quant", "foreign"):  # of no other use than to be refused by name
            shown = f'"{value}"' if isinstance(value, str) else str(value).lower()
            remedy = f"{self.instead}, and remove {self.name}"
        yield f"{self.name} is {shown}, which this version does not have: {remedy}"

    def find_ignored(self, value: Any) -> str | None:
        """The warning for a value that was given, does nothing here, and might be missed."""
        is_off = value in (None, False, "") or value == self.quiet_value
        if self.group != "foreign":
            is_off = is_off or value in (-1, 0) or value == self.default
        is_silent = is_off or self.quiet or not self.ignored
        return None if is_silent else f"{self.name} has no effect here: {self.ignored}"


def setting(default: Any, help_text: str, help_zh: str, /, **facts: Any) -> Any:
    """A field of a group of settings; its name and type are those of the field.

    Args:
        default: Value when the key is absent or null.
        help_text: The help in English.
        help_zh: The help in Chinese.
        **facts: Further attributes of `Setting`.
    """
    return dataclasses.field(default=default, metadata={"help": help_text, "help_zh": help_zh, **facts})
