"""Answers the lines of a file, or talks on the terminal, with a dynamic or an exported model.

python predict_generation.py --model_name_or_path ./checkpoints/llama --data_file in.jsonl --output_file out.jsonl
python predict_generation.py --model_name_or_path ./exported
"""

import sys

from finetune.machine.command_start import start_command

if __name__ == "__main__":  # until `run_command`: the imports below take a moment
    start_command()

from finetune.commands.predict import main
from finetune.processes.command import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
