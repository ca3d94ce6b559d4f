"""Exports a model to a static graph that Paddle runs without PaddleNLP.

python export_model.py --model_name_or_path ./checkpoints/llama --output_path ./exported [--lora_path ...]
"""

import sys

from finetune.machine.command_start import start_command

if __name__ == "__main__":  # until `run_command`: the imports below take a moment
    start_command()

from finetune.machine.environment import check_machine
from finetune.machine.processor import configure_processor
from finetune.machine.quiet import silence_libraries
from finetune.processes.command import run_command
from finetune.serving.export.options import parse_options


def main() -> None:
    """Parses, checks, exports."""
    options = parse_options()
    check_machine()
    options.check()
    if options.device == "cpu":
        configure_processor()

    from finetune.adapters.missing_updates import describe_missing
    from finetune.models.resolve import resolve_model

    options = options.with_local_adapter()
    resolved = resolve_model(options.model_name_or_path)
    lora = options.lora_path
    missing = describe_missing(lora, resolved.family, resolved.config) if lora else []
    for line in [*resolved.notes, *missing]:
        print(line)
    silence_libraries()
    from finetune.serving.export.run import export

    facts = export(options, resolved)
    limit = "any length" if facts.max_positions is None else f"up to {facts.max_positions} tokens"
    print(f"{options.output_path}: {facts.family} as a static graph, {facts.dtype}, texts of {limit}")


if __name__ == "__main__":
    sys.exit(run_command(main))
