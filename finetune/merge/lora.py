"""merge_lora_params.py: a model with its adapters in its weights, or without one that was merged before.

    W + factor * A @ B, in float32, rounded once to the base's element type

What changes is decided from names and shapes (`lora_plan`), then tensors go one by one from file to file (`storage.writer`);
those without an update are copied inside the kernel. Neither Paddle nor PyTorch is imported; `--verify` alone needs
Paddle.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.adapters.adapter_folder import LORA_CONFIG
from finetune.adapters.missing_updates import check_complete, describe_missing
from finetune.adapters.peft_config import PEFT_CONFIG
from finetune.adapters.peft_folder import WEIGHTS_STEM
from finetune.data.templates.trained_template import carry_template
from finetune.errors import EXIT_FAILED, UserError
from finetune.machine.command_names import MERGE_LORA, PREDICT, next_command, usage_name
from finetune.machine.command_parser import CommandParser
from finetune.machine.screen import print_text, show_line
from finetune.merge import hf_out, quantised_base
from finetune.merge.hub_names import local_base, named_base_folder
from finetune.merge.lora_adapters import (
    Adapter,
    check_adapter_folder,
    named_base,
    read_paddle_adapter,
)
from finetune.merge.lora_base import Base, linear_layers, open_base
from finetune.merge.lora_companions import write_companions
from finetune.merge.lora_plan import plan
from finetune.merge.option_types import add_output_options, add_switch
from finetune.merge.peft_adapters import peft_tensors, read_peft_adapter, write_peft_config
from finetune.merge.progress_bar import show_progress
from finetune.merge.quantised_base import DEQUANTISED, ORIGINAL
from finetune.merge.tokenizer_files import copy_tokenizer
from finetune.models.hf_names import embedding_name
from finetune.models.hubs.adapters import local_adapter
from finetune.storage.output_folder import check_output, output_folder
from finetune.storage.writer import Layout, Tensor, count_bytes, write_tensors

PADDLE, HUGGING_FACE, PEFT = "paddle", "hf", "peft"
_OUTPUT_OPTION = "--merge_model_path"


@dataclass(frozen=True)
class MergeOptions:
    """The command line.

    Attributes:
        base: Folder of the model; None takes the one that the first adapter names.
        adapters: Folders, merged in this order.
        output: Folder of the result.
        max_shard_bytes: Most bytes of tensors in a file.
        save_format: PADDLE, HUGGING_FACE, PEFT; None keeps the base's.
        unmerge: Whether to take the adapters out of a merged model.
        overwrite: Whether the result of an earlier merge is replaced.
        verify: Whether to run base and adapter beside the merged model, and fail where they differ.
        into: ORIGINAL weights, or the DEQUANTISED ones that were trained over.
    """

    base: Path | None
    adapters: tuple[Path, ...]
    output: Path
    max_shard_bytes: int = 5 * 10**9
    save_format: str | None = None
    unmerge: bool = False
    overwrite: bool = False
    verify: bool = False
    into: str = ORIGINAL


def main(argv: Sequence[str] | None = None) -> None:
    """Merges what the command line names."""
    options = with_local_adapters(parse_options(argv))
    if options.save_format == PEFT:
        export_peft(options)
    else:
        merge(options)


def with_local_adapters(options: MergeOptions) -> MergeOptions:
    """The same with the folders of adapters that were given by names on hubs.

    Raises:
        UserError: No hub has one, or it is no adapter.
    """
    return replace(options, adapters=tuple(local_adapter(each, "--lora_path") for each in options.adapters))


def merge(options: MergeOptions) -> None:
    """Writes the merged model and says what was written.

    Raises:
        UserError: An adapter does not fit the base, files are missing or damaged, or there is no room.
        SystemExit: With code 1: the result, which stays, is not what `--verify` expects.
    """
    began = time.monotonic()
    if options.verify:
        _check_paddle()
    base = open_base(_find_base(options))
    adapters = _open_adapters(options, base)
    hugging_face = options.save_format == HUGGING_FACE if options.save_format else base.is_hugging_face
    form = base.stored_format
    scheme = quantised_base.scheme_to_apply(options.adapters, options.into, form, unmerge=options.unmerge)
    tensors, num_tokens = plan(
        base, adapters, unmerge=options.unmerge, hugging_face=hugging_face, scheme=scheme
    )
    record: dict[str, object] = {
        "source": str(base.folder),
        "kind": "model",
        "adapters": [str(adapter.folder) for adapter in adapters],
        "unmerged": options.unmerge,
        "into": options.into,
    }
    with output_folder(options.output, record, option=_OUTPUT_OPTION) as folder:
        write_companions(
            base,
            adapters,
            folder,
            hugging_face=hugging_face,
            num_tokens=num_tokens,
            tensors=tensors,
            unmerge=options.unmerge,
        )
        if base.other_parts and hugging_face:
            tensors = hf_out.write_whole(base, tensors, folder)
        layout = Layout(max_shard_bytes=options.max_shard_bytes, format="pt" if hugging_face else "np")
        with show_progress(sum(map(count_bytes, tensors))) as advance:
            files = write_tensors(folder, tensors, layout, advance=advance)
    _report(options, base, adapters, tensors, num_files=len(files), seconds=time.monotonic() - began)
    if line := quantised_base.describe_choice(options.adapters, scheme, form):
        print_text(line)
    if hugging_face and (line := hf_out.describe_needed_code(options.output, base.family)):
        print_text(line)
    if options.verify:
        from finetune.merge.lora_verify import verify

        trained = quantised_base.trained_scheme(options.adapters)
        comparison = verify(
            base, adapters, options.output, unmerge=options.unmerge, scheme=scheme, trained=trained
        )
        if not comparison.is_close:
            show_line(f"error: {comparison.fault(options.output)}")
            raise SystemExit(EXIT_FAILED)


def _check_paddle() -> None:
    if importlib.util.find_spec("paddle") is None:
        raise UserError("--verify needs Paddle, which is not installed: install it, or leave --verify out")


def export_peft(options: MergeOptions) -> None:
    """Writes an adapter in peft's form, for the base in Hugging Face's form.

    Raises:
        UserError: It cannot be expressed there.
    """
    base_folder = _find_base(options)
    if len(options.adapters) > 1 or options.unmerge:
        raise UserError(
            "--save_format peft converts one adapter: give one --lora_path and leave --unmerge out"
        )
    if options.verify:
        raise UserError(
            "--verify runs a merged model, and --save_format peft writes none: leave one of them out"
        )
    base = open_base(base_folder)
    (adapter,) = _open_adapters(options, base)
    plan(base, [adapter], hugging_face=True)
    if adapter.needs_unchanged_base:
        raise UserError(
            f"{adapter.folder} was trained with pissa: peft would add it to a base that still holds what it started "
            "from. Merge it (--save_format hf)"
        )
    family = base.other_parts.record_in_whole(base.family) if base.other_parts else base.family
    tensors = peft_tensors(adapter, family, base.adapted_config, tied=base.is_tied)
    record: dict[str, object] = {"source": str(adapter.folder), "kind": "lora"}
    with output_folder(options.output, record, option=_OUTPUT_OPTION) as folder:
        copy_tokenizer(adapter.folder, folder)
        carry_template([adapter.folder], folder)
        if (folder / "tokenizer_config.json").is_file():
            hf_out.write_tokenizer_files(folder, base.family)
        write_peft_config(adapter, tensors, folder, family=family, base=str(base_folder))
        write_tensors(folder, tensors, Layout(WEIGHTS_STEM, 2**62, "pt"))
    size = sum(map(count_bytes, tensors)) / 1e6
    print_text(
        f"exported {adapter.folder} for peft",
        f"wrote {options.output}: {len(tensors)} tensors, {size:.3g} MB",
        f"next: PeftModel.from_pretrained(<{base_folder.name} in Hugging Face's form>, {str(options.output)!r})",
    )
    if not base.is_hugging_face:
        print_text(
            f"note: {base_folder} is in PaddleNLP's form, which peft cannot load: set base_model_name_or_path in "
            f"{options.output / PEFT_CONFIG} to the folder or the hub name of the same model in Hugging Face's form "
            "(--save_format hf makes such a folder of a merge)"
        )


def _find_base(options: MergeOptions) -> Path:
    """The base, given or named by the first adapter, once everything named exists and differs."""
    for folder in options.adapters:
        check_adapter_folder(folder)
    base = local_base(options.base) if options.base else None
    if base is None:
        name = named_base(options.adapters[0])
        if name is None:
            raise UserError(
                f"{options.adapters[0]} does not name the base it was trained on: give it with --model_name_or_path"
            )
        base = named_base_folder(name, options.adapters[0])
    if not base.is_dir():
        origin = "--model_name_or_path" if options.base else f"the base that {options.adapters[0]} names,"
        raise UserError(f"{origin} {base} is no folder: give the base's with --model_name_or_path")
    check_output(
        options.output, (base, *options.adapters), overwrite=options.overwrite, option=_OUTPUT_OPTION
    )
    return base


def _open_adapters(options: MergeOptions, base: Base) -> list[Adapter]:
    adapters = []
    for folder in options.adapters:
        if (folder / LORA_CONFIG).is_file():
            adapters.append(adapter := read_paddle_adapter(folder, base.num_inputs))
            layers = [*linear_layers(base), embedding_name(base.family).removesuffix(".weight")]
            check_complete(folder / LORA_CONFIG, adapter.config, layers, adapter.updates)
        else:
            adapters.append(
                read_peft_adapter(folder, base.family, tied=base.is_tied, num_inputs=base.num_inputs)
            )
            for line in describe_missing(folder, base.family, base.config):
                print_text(line)
    return adapters


def _report(
    options: MergeOptions,
    base: Base,
    adapters: Sequence[Adapter],
    tensors: Sequence[Tensor],
    *,
    num_files: int,
    seconds: float,
) -> None:
    names = ", ".join(str(each.folder) for each in adapters)
    changed = sum(len(adapter.updates) for adapter in adapters)
    replaced = sum(len(adapter.whole) for adapter in adapters)
    what = f"took {names} out of {base.folder}" if options.unmerge else f"merged {names} into {base.folder}"
    size = sum(map(count_bytes, tensors)) / 1e9
    print_text(
        f"{what}: {changed} low-rank updates" + f", {replaced} tensors replaced" * bool(replaced),
        f"wrote {options.output}: {len(tensors)} tensors, {size:.3g} GB in {num_files} file{'s' * (num_files > 1)}, "
        f"{seconds:.1f} s",
        f"next: {next_command(PREDICT, ['--model_name_or_path', str(options.output)])}",
    )


def parse_options(argv: Sequence[str] | None = None) -> MergeOptions:
    """Reads the command line; a wrong one ends the process with code 2."""
    parser = CommandParser(
        prog=usage_name(MERGE_LORA), description="Merges LoRA adapters into the weights of their base."
    )
    parser.add_argument("--model_name_or_path", type=Path, metavar="BASE",
                        help="folder of the base, in PaddleNLP's or Hugging Face's form, or its name on a hub (default: "
                             "the one that the adapter names)")  # fmt: skip
    parser.add_argument("--lora_path", nargs="+", action="append", required=True, metavar="LORA",
                        help="folder of an adapter (of this project, PaddleNLP or peft), or its name on a hub; several are merged in their "
                             "order: repeat the option, or separate them by commas or blanks")  # fmt: skip
    parser.add_argument("--merge_model_path", "--merge_lora_model_path", "--output_path", type=Path, required=True, metavar="OUT",
                        help="folder of the result")  # fmt: skip
    add_output_options(parser)
    parser.add_argument("--save_format", choices=(PADDLE, HUGGING_FACE, PEFT),
                        help="names and shapes of the result (default: the base's); peft writes the adapter alone in "
                             "peft's form, unmerged")  # fmt: skip
    parser.add_argument("--into", choices=(ORIGINAL, DEQUANTISED), default=ORIGINAL,
                        help="of an adapter that was trained over a quantised base: merge it into the original weights, "
                             "or into what it was trained over (default: original)")  # fmt: skip
    add_switch(parser, "--unmerge", "take the adapter out of a model it was merged into")
    add_switch(
        parser,
        "--verify",
        "then run prompts through base + adapter and through the result, in float32 (needs Paddle)",
    )
    args = parser.parse_args(argv)
    folders = [Path(name) for group in args.lora_path for text in group for name in text.split(",") if name]
    return MergeOptions(
        base=args.model_name_or_path,
        adapters=tuple(folders),
        output=args.merge_model_path,
        max_shard_bytes=args.max_shard_size,
        save_format=args.save_format,
        unmerge=args.unmerge,
        overwrite=args.overwrite,
        verify=args.verify,
        into=args.into,
    )
