"""Exports a model to a static graph that Paddle runs without PaddleNLP.

python export_model.py --model_name_or_path ./checkpoints/llama --output_path ./exported [--lora_path ...]
"""

import sys

from finetune.machine.command_start import start_command

if __name__ == "__main__":  # until `run_command`: the imports below take a moment
    start_command()

from finetune.commands.export import main
from finetune.processes.command import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
