"""Fine-tunes a generative language model from a JSON argument file.

python finetune_generation.py ./llama/lora_argument.json [--key value ...]
python finetune_generation.py --help
"""

import sys

from finetune.machine.command_start import start_command

if __name__ == "__main__":  # until `run_command`: the imports below take a moment
    start_command()

from finetune.commands.train import main
from finetune.processes.command import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
