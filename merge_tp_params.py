"""Merges the files of all tensor- and pipeline-parallel ranks into one model or adapter.

python merge_tp_params.py --model_name_or_path checkpoints/run [--output_dir merged]
python merge_tp_params.py --help
"""

import sys

from finetune.machine.memory_limit import require_address_space
from finetune.machine.stop_signals import end_at_once, set_handlers

if __name__ == "__main__":  # until `run_command`: the imports below take a moment
    set_handlers(end_at_once)
    require_address_space()

from finetune.merge.tensor_parallel import main
from finetune.processes.command import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
