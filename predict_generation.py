"""Answers the lines of a file, or talks on the terminal, with a dynamic or an exported model.

python predict_generation.py --model_name_or_path ./checkpoints/llama --data_file in.jsonl --output_file out.jsonl
python predict_generation.py --model_name_or_path ./exported
"""

import sys

from finetune.machine.command_start import start_command

if __name__ == "__main__":  # until `run_command`: the imports below take a moment
    start_command()

from finetune.machine.device import device_kind
from finetune.machine.environment import check_machine
from finetune.machine.processor import configure_processor
from finetune.processes.command import run_command
from finetune.serving.predict.run import parse_options, predict


def main() -> None:
    """Parses, checks, answers."""
    options = parse_options()
    check_machine()
    options.check()
    if device_kind(options.model.device) == "cpu":
        configure_processor()
    predict(options)


if __name__ == "__main__":
    sys.exit(run_command(main))
