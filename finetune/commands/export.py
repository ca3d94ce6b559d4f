"""An export from its first check to its last file."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.machine.environment import check_machine
from finetune.machine.processor import configure_processor
from finetune.machine.quiet import silence_libraries
from finetune.machine.screen import print_text
from finetune.serving.export.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, checks, exports."""
    options = parse_options(argv)
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
        print_text(line)
    silence_libraries()
    from finetune.serving.export.run import export

    facts = export(options, resolved)
    limit = "any length" if facts.max_positions is None else f"up to {facts.max_positions} tokens"
    print_text(f"{options.output_path}: {facts.family} as a static graph, {facts.dtype}, texts of {limit}")
