"""The options with which the chat shows a run: its model before, and after."""

from __future__ import annotations

from pathlib import Path

from finetune.run.directory import ARGUMENTS_FILE
from finetune.serving.chat.run import ChatOptions, parse_options
from finetune.storage.files import read_json_object


def chat_options(output: Path) -> ChatOptions:
    """The options of the chat page for the output folder of a run.

    An adapter stands beside its base, whose weights are then in memory once; a whole model beside the one that it was.

    Raises:
        UserError: The folder's record of the run cannot be read.
    """
    arguments = read_json_object(output / ARGUMENTS_FILE, keys=("model_name_or_path",))
    adapter = (
        "--lora_path"
        if arguments.get("lora")
        else "--prefix_path"
        if arguments.get("prefix_tuning")
        else None
    )
    own = [adapter, str(output)] if adapter else ["--second_model", str(output)]
    return parse_options(
        [f"--model_name_or_path={arguments['model_name_or_path']}", *own, "--temperature", "0"]
    )
