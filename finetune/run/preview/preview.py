"""Shows what a run would train on, without its weights: ``--preview N``.

The data take the same way as in a run (the same reading, drawing, template, lengths and faults), so what
is shown is what is trained. Neither Paddle nor PaddleNLP is imported, unless the tokenizer is one that
only PaddleNLP reads; nothing is written to the output folder.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from finetune.data.preference.sample import PreferenceSample
from finetune.machine.language.translation import translate, translate_piece
from finetune.machine.screen import show_line
from finetune.run.alignment import gives_rewards
from finetune.run.preview.preferences import count_preferences, print_preferences
from finetune.run.preview.tables import Figures, count_prompts, count_samples, print_figures
from finetune.run.preview.tokens import Example, TokenReader, print_example, uses_marks

if TYPE_CHECKING:
    from rich.console import Console

    from finetune.data.reading.mixing import DataSource
    from finetune.models.resolve import ResolvedModel
    from finetune.run.data import RunData
    from finetune.settings.arguments import Arguments

_TITLES = {"train": "Training data", "dev": "Evaluation data"}


def show(
    args: Arguments,
    resolved: ResolvedModel,
    files: dict[str, list[DataSource]],
    *,
    stream: TextIO | None = None,
) -> None:
    """Prints the first samples of a run as they will be trained, and figures of all of them.

    Args:
        args: The arguments; ``args.data.preview`` says how many samples.
        resolved: The model, whose weights may be missing.
        files: The data sets by split, from `finetune.run.data.find_files`.
        stream: stdout by default.

    Raises:
        UserError: The same faults of tokenizer, template and data as in a run.
    """
    from finetune.processes.launch import is_first_process
    from finetune.reporting.report import make_console
    from finetune.run.data import read_data
    from finetune.run.preview.encoder import load_preview_encoder
    from finetune.run.tokenizer import TokenizerPair

    if not is_first_process():
        return
    for warning in args.warnings:
        show_line(f"warning: {warning}")
    encoder, note = load_preview_encoder(args, resolved)
    if note:
        show_line(note)
    data = read_data(args, files, TokenizerPair(tokenizer=None, encoder=encoder))
    console = make_console(stream if stream is not None else sys.stdout)
    samples = (data.train or data.dev)[: args.data.preview]
    if samples and isinstance(samples[0], PreferenceSample):
        print_preferences(console, samples, TokenReader(encoder))
    else:
        _print_examples(console, _choose_examples(data, args.data.preview), TokenReader(encoder))
    for split, report in data.reports.items():
        print_figures(console, _TITLES[split], report, _count(args, data, split))


def _choose_examples(data: RunData, number: int) -> list[Example]:
    """The first training samples; in a run that only evaluates, what it evaluates on."""
    if data.prompts and not data.train:
        return [Example.of_prompt(prompt) for prompt in data.prompts[:number]]
    return [Example.of_sample(sample) for sample in (data.train or data.dev)[:number]]


def _count(args: Arguments, data: RunData, split: str) -> Figures:
    if split == "dev" and args.data.eval_with_do_generation:
        return count_prompts(data.prompts)
    samples = data.train if split == "train" else data.dev
    pack_to = args.data.max_length if args.data.zero_padding else None
    if isinstance(samples[0], PreferenceSample):
        reads_ends = gives_rewards(args)
        return count_preferences(samples, pack_to=pack_to, seed=args.training.seed, reads_ends=reads_ends)
    return count_samples(samples, pack_to=pack_to, seed=args.training.seed)


def _print_examples(console: Console, examples: list[Example], reader: TokenReader) -> None:
    from rich.text import Text

    how, colour = ("in [[ ]]", "") if uses_marks(console) else ("green", "green")
    before, after = translate("What is learned is "), translate("; below each token stands its id.")
    console.print(Text.assemble(before, (translate_piece(how), colour), after))
    for number, example in enumerate(examples, start=1):
        print_example(console, f"Sample {number}", example, reader)
