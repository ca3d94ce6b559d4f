"""What was read by a rule and not as it stands, and which fields were left aside: counted, and told once.

Data from elsewhere have turns out of order, numbers where text is expected, and columns that no format here
knows. Each such thing has a rule (docs/data.md lists them), and the report of a run has their counts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

NUMBER_AS_TEXT = "numbers read as text"
NULL_CONTENT = "messages with null read as empty"
SYSTEMS_JOINED = "system messages joined"
SYSTEM_INSIDE = "system messages inside a conversation put in front of the next prompt"
SYSTEM_LAST = "system messages behind everything left out"
PROMPTS_JOINED = "prompts in a row joined"
ANSWERS_JOINED = "answers in a row joined"
ANSWER_FIRST = "answers before the first prompt left out"
PROMPT_LAST = "prompts without an answer left out"
EMPTY_ANSWER = "empty answers inside a conversation not learned"
HISTORY_GAP = "rounds of a history without a prompt or an answer left out"
HISTORY_TEXT = "histories read out of text"
EMPTY_PROMPT = "examples without a prompt read as running text"
CALL_WITHOUT_ARGUMENTS = "calls of functions without arguments given an empty object"
TOOL_NAMES_JOINED = "names or ids of joined tool results left out"
TOOL_NAMES_LEFT_OUT = "names or ids of tool results left out, for which the chat template has no place"
OTHER_FORMAT = "examples of another format than the file begins with"
ANSWER_UNLEARNED = "answers marked as not to be learned"
EXAMPLE_UNLEARNED = "examples marked as not to be learned left out"
BAD_ANSWER = "examples marked as bad answers"
PROMPT_MARKED = "prompts marked to be learned, which are not"
REASONING_WRITTEN = "answers whose reasoning the chat template writes, so that it is learned"
REASONING_LEFT_OUT = "answers whose reasoning is left out, for which the chat template has no place"
EQUAL_ANSWERS = "pairs whose answers are equal left out"
EQUAL_RANKS = "examples whose answers all have one rank left out"
RANKED_LIST = "ranked lists read as pairs of the best answer and each that is ranked below it"
PAIR_DIVIDED = "pairs read as a good and a bad answer"
TEXT_DIVIDED = "texts longer than max_length divided into several samples"
LATER_ANSWERS_TOO_LONG = "conversations whose later answers are left out, as they are too long"
ANSWERS_APART = "conversations divided so that each answer is a sample of its own"

_MAX_NAMES = 12


@dataclass
class ReadingNotes:
    """Counts of what happened while files were read.

    Attributes:
        rules: How often each rule was applied.
        unused_fields: In how many examples a field had a value and was not used.
    """

    rules: Counter[str] = field(default_factory=Counter)
    unused_fields: Counter[str] = field(default_factory=Counter)

    def add(self, rule: str, count: int = 1) -> None:
        """Counts a rule."""
        self.rules[rule] += count

    def describe(self) -> list[str]:
        """Parts of the line for the log; empty where all was read as it stands."""
        parts = []
        if self.rules:
            rules = (f"{rule}: {count:,}" for rule, count in sorted(self.rules.items()))
            parts.append(f"read by rule: {', '.join(rules)}")
        if self.unused_fields:
            named = self.unused_fields.most_common(_MAX_NAMES)
            names = ", ".join(f"{name} ({count:,})" for name, count in named)
            more = len(self.unused_fields) - len(named)
            parts.append(f"fields not used: {names}{f' and {more} more' if more else ''}")
        return parts
