"""Names and values that other tools have for a setting of this project.

``synonyms.json`` lists them: under "settings" what is read as one of ours, or named in a fault with what to
write instead; under "ignored" what changes nothing here; under "methods" how the argument file of another
method is recognised. A name is read as ours only where both mean the same; where a tool's value means
something else here, the fault says what to write.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.settings.conversion import take_word
from finetune.settings.registry import read_rows

# Names that win over another for the same setting: an earlier one of PaddleNLP, whose files of December 2023 set
# both, and those that say in detail what another says by default: what a number of bits means, which loss a method has.
WINNING_NAMES = frozenset({"intokens", "double_quantization", "quantization_type", "bnb_4bit_quant_type",
                           "bnb_4bit_use_double_quant", "loss_type", "pref_loss", "rpo_alpha", "cpo_alpha"})  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synonym:
    """What another tool's key, or one of its values, means here."""

    # fmt: off
    name: str                                             # the key
    tools: tuple[str, ...]                                # who has it
    setting: str | None = None                            # ours, which takes the value as it is
    values: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Value in lower case -> our settings that say the same; null takes a setting back to its default."""
    instead: str = ""                                     # what to write for values that are not listed
    instead_zh: str = ""                                  # the same in Chinese
    # fmt: on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method whose argument files look like ours and are not."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    """Alternatives, each of keys that must all be given, some with a value: "stage=dpo"."""
    instead: str
    instead_zh: str

    def find_signs(self, given: Mapping[str, Any]) -> list[str]:
        """The keys by which the method is recognised; empty when it is not."""
        for keys in self.needs:
            wanted = [key.partition("=") for key in keys]
            if all(name in given and value in ("", spell(given[name])) for name, _, value in wanted):
                return list(keys)
        return []


@functools.cache
def known_synonyms() -> dict[str, Synonym]:
    """Every name of another tool that is read as one of ours, or answered."""
    rows = read_rows("synonyms.json")["settings"]
    return {
        name: Synonym(**{**row, "name": name, "tools": tuple(row["tools"])}) for name, row in rows.items()
    }


@functools.cache
def known_methods() -> tuple[Method, ...]:
    """Methods whose files are recognised, the most special first."""
    rows = read_rows("synonyms.json")["methods"]
    return tuple(Method(**{**row, "needs": tuple(tuple(keys) for keys in row["needs"])}) for row in rows)


def find_method_fault(given: Mapping[str, Any], origin: str) -> str | None:
    """The fault of a file that is made for another method; None when it is for this command.

    Args:
        given: Keys and values as they were written.
        origin: Where they stand, such as "in args.json".
    """
    for method in known_methods():
        if signs := method.find_signs(given):
            return f"these are settings of {method.name} ({', '.join(signs)} {origin}): {method.instead}"
    return None


def translate(key: str, raw: Any) -> Iterator[tuple[str, Any]]:
    """The settings and values that a key of an argument file stands for, itself where it is one of ours.

    Raises:
        ValueError: With what to write instead, when the value has no counterpart here.
    """
    synonym = known_synonyms().get(key)
    if synonym is None:
        yield key, raw
    elif raw is None:  # not given
        return
    elif (same := synonym.values.get(spell(raw))) is not None:
        yield from same.items()
    elif synonym.setting is not None:
        yield synonym.setting, raw
    elif synonym.instead:
        raise ValueError(synonym.instead)
    else:
        yield key, raw


def spell(raw: Any) -> str:
    """A value as `Synonym.values` spells it: lower case, one word of the command line without its list."""
    return str(take_word(raw)).lower()
