"""How the models of a family write conversations and calls of functions, as strings in the family's record.

Each string is the one that the family's publisher trained with; tests/data/test_chat_templates.py shows every one of
them written out. A pattern holds ``{content}``; in a user's also ``{round}`` (counted from `first_round`) and, where
the system text stands inside the first user's message, ``{system}``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a family writes functions on offer and calls of them.

    Attributes:
        head: What stands before the functions.
        function: One of them; ``{name}``, and ``{json}`` for all of it.
        call: A call; ``{name}``, and ``{arguments}`` as JSON.
        opening: The special token before each call but the first, and before the first where text precedes it.
    """

    head: str
    function: str
    call: str
    opening: str


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a family writes conversations.

    Attributes:
        user: A user's message and all that stands before the answer.
        only_user: The same where it is the only one; None: `user`.
        first_round: Number of the first round.
        answer: The answer; learned whole.
        tool: The same as `user` for what a tool returned; None writes it as a user's message.
        system: The system text.
        opening: What every conversation begins with.
        end: The special token that ends an answer, learned; "" leaves that to end-of-sequence.
        ends_with_next: Whether the special token that opens the next message ends an answer, and is learned; the last
            answer ends with the one of a user's message, a call of a function with that of its result.
        after: What follows an answer before the next message; not learned.
        trims: Whose texts lose the blanks at their ends: "system", "user" (and what tools returned), "answer".
        default_system: The system text of conversations that have none.
        special_tokens: What in these strings is a special token.
        tools: How functions on offer, in a system text of their own, and calls of them are written; None writes JSON
            into the system text and calls as the text of an answer.
    """

    user: str
    answer: str = "{content}"
    only_user: str | None = None
    first_round: int = 1
    tool: str | None = None
    system: str = "{content}"
    opening: str = ""
    end: str = ""
    ends_with_next: bool = False
    after: str = ""
    trims: tuple[str, ...] = ()
    default_system: str | None = None
    special_tokens: tuple[str, ...] = ()
    tools: ToolFormat | None = None


CHATML = ChatFormat(
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    tool="<|im_start|>tool\n{content}<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    after="\n",
    special_tokens=("<|im_start|>", "<|im_end|>"),
)
