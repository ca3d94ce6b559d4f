"""The words that `paddle-finetune` understands, each a record; a new command is one more of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One word of the command line.

    Attributes:
        word: What the user types; two words for one kind of a thing (`merge lora`).
        summary: One line of the help.
        module: Where it lives, imported only when it runs.
        function: Its entry there: takes the remaining words, returns an exit code or None.
        threads_below: False where BLAS must not start threads, because the command has its own.
    """

    word: str
    summary: str
    module: str
    function: str = "main"
    threads_below: bool = True

    def load(self) -> Callable[..., int | None]:
        """The function that runs it."""
        function: Callable[..., int | None] = getattr(importlib.import_module(self.module), self.function)
        return function


COMMANDS = (
    Command("init", "write an argument file, by questions or from options", "finetune.commands.init"),
    Command("preview", "show what a run would train on: tokens, labels, lengths", "finetune.commands.train", "preview"),
    Command("plan", "tell memory, steps, disk and time of a run before it starts", "finetune.commands.plan"),
    Command("train", "fine-tune a model from an argument file", "finetune.commands.train"),
    Command("predict", "answer the lines of a file, or talk on the terminal", "finetune.commands.predict"),
    Command("page", "prepare, start, watch and try out trainings in the browser", "finetune.commands.page.run"),
    Command("chat", "talk with a model in the browser", "finetune.serving.chat.run"),
    Command("serve", "answer requests of OpenAI's interface over HTTP", "finetune.serving.api.run"),
    Command("merge lora", "merge LoRA adapters into their base", "finetune.merge.lora", threads_below=False),
    Command("merge tp", "join the files of all ranks into one model", "finetune.merge.tensor_parallel"),
    Command("export", "write a model as a static graph", "finetune.commands.export"),
    Command("gguf", "write a model as one GGUF file for llama.cpp and Ollama", "finetune.serving.gguf.__main__"),
    Command("schema", "show the JSON Schema of argument files, for editors", "finetune.commands.schema"),
    Command("tiny", "write a tiny random model to rehearse with", "finetune.models.tiny.__main__"),
    Command("doctor", "check versions, device, memory, disk and hubs", "finetune.commands.doctor"),
)  # fmt: skip
"""In the order in which a newcomer meets them."""


def find_command(word: str) -> Command:
    """The command of this word."""
    return next(command for command in COMMANDS if command.word == word)
