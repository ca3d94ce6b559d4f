"""The chat page by its short name: `python -m finetune.chat`."""

import sys

from finetune.machine.command_start import start_command

if __name__ == "__main__":  # until `run_command`: the imports below take a moment
    start_command()

from finetune.processes.command import run_command
from finetune.serving.chat.run import main

if __name__ == "__main__":
    sys.exit(run_command(main))
