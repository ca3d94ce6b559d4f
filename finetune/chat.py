"""The chat page by its short name: `python -m finetune.chat`."""

import sys

from finetune.processes.command import run_command
from finetune.serving.chat.run import main

if __name__ == "__main__":
    sys.exit(run_command(main))
