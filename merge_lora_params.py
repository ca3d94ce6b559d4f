"""Merges LoRA adapters into the weights of their base.

python merge_lora_params.py --lora_path checkpoints/lora --merge_model_path merged
python merge_lora_params.py --help
"""

import os
import sys

# Two threads each merge a tensor of their own; more threads below them would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from finetune.machine.command_start import start_command

if __name__ == "__main__":  # until `run_command`: the imports below take a moment
    start_command()

from finetune.merge.lora import main
from finetune.processes.command import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
