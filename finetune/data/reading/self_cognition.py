"""Examples that teach a model its name and its maker: questions and answers with placeholders filled in."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from finetune.data.reading.conversation import Conversation
from finetune.data.reading.formats import read_conversations
from finetune.data.reading.mixing import draw
from finetune.errors import UserError
from finetune.settings.conversion import CHINESE

OWN_FILE = Path(__file__).with_name("self_cognition.json")

_PLACEHOLDERS = re.compile(r"\{\{\s*(name|author)\s*\}\}", re.IGNORECASE)


def split_names(value: str) -> tuple[str, str]:
    """The Chinese and the English form of a name.

    Two words, the first with Chinese characters and the second without, such as "小桨 Paddy", are one
    form each; any other value serves for both.
    """
    first, _, rest = value.strip().partition(" ")
    if rest and CHINESE.search(first) and not CHINESE.search(rest):
        return first, rest.strip()
    return value.strip(), value.strip()


def make_self_cognition(
    num_samples: int, model_name: str, model_author: str, *, seed: int, file: str | Path | None = None
) -> list[Conversation]:
    """Expands a file of questions and answers.

    ``{{name}}`` and ``{{author}}`` are replaced in all messages: by the Chinese form in a conversation
    that has Chinese characters, by the English form in any other.

    Args:
        num_samples: How many conversations; more than the file has repeat it.
        model_name: The model's name, or its Chinese and English names.
        model_author: The same for who made it.
        seed: Decides which are drawn.
        file: In any format that `finetune.data.reading.formats` reads; None takes our own.

    Raises:
        UserError: The file is faulty, or has no placeholder.
    """
    file = Path(file).expanduser() if file else OWN_FILE
    if not file.is_file():
        raise UserError(f"self_cognition_file: {file} is no file.")
    conversations = read_conversations([file])
    forms = {"name": split_names(model_name), "author": split_names(model_author)}
    filled = [_fill(conversation, forms) for conversation in conversations]
    if filled == conversations:
        raise UserError(
            f"self_cognition_file: {file} has neither {{{{name}}}} nor {{{{author}}}} in its texts."
        )
    return draw(filled, num_samples, f"{seed}:self_cognition")


def _fill(conversation: Conversation, forms: dict[str, tuple[str, str]]) -> Conversation:
    texts = "".join(message.content for message in conversation.messages)
    language = 0 if CHINESE.search(texts) else 1

    def fill(text: str) -> str:
        return _PLACEHOLDERS.sub(lambda found: forms[found.group(1).lower()][language], text)

    messages = tuple(message._replace(content=fill(message.content)) for message in conversation.messages)
    system = fill(conversation.system) if conversation.system else conversation.system
    return replace(conversation, messages=messages, system=system)
