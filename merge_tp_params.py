"""Merges the files of all tensor- and pipeline-parallel ranks into one model or adapter.

python merge_tp_params.py --model_name_or_path checkpoints/run [--output_dir merged]
python merge_tp_params.py --help
"""

import sys

from finetune.machine.command_start import start_command

if __name__ == "__main__":  # until `run_command`: the imports below take a moment
    start_command()

from finetune.merge.tensor_parallel import main
from finetune.processes.command import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
