"""`python -m finetune`: the program `paddle-finetune` by its module."""

import sys

from finetune.commands.command_line import main

if __name__ == "__main__":
    sys.exit(main())
