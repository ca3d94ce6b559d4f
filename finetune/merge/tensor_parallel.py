"""merge_tp_params.py: one model from the files of all tensor- and pipeline-parallel ranks.

Nothing is asked that the files tell: degrees stand in their names, the kind of tensors too, the rules in the family's
record. Tensors go one by one from the ranks' files to the result (`storage.writer`), which appears as a whole (`output_folder`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.checkpoints import companions
from finetune.checkpoints.folder import MANIFEST_NAME, find_fault
from finetune.data.templates.trained_template import carry_template
from finetune.errors import UserError
from finetune.families.family import Family, find_family
from finetune.families.multimodal.text_part import text_part
from finetune.machine.command_names import MERGE_LORA, MERGE_RANKS, PREDICT, next_command, usage_name
from finetune.machine.command_parser import CommandParser
from finetune.machine.screen import print_text
from finetune.merge import hf_out
from finetune.merge.option_types import add_output_options, add_switch
from finetune.merge.progress_bar import show_progress
from finetune.merge.source import LORA, MODEL, PREFIX, Source, open_source
from finetune.models.other_parts import copy_files_of_others
from finetune.storage.files import read_json_if_present
from finetune.storage.output_folder import check_output, output_folder
from finetune.storage.writer import Layout, Tensor, count_bytes, write_tensors

PADDLE, HUGGING_FACE = "paddle", "hf"


@dataclass(frozen=True)
class MergeOptions:
    """The command line.

    Attributes:
        source: Folder of the checkpoint.
        output: Folder of the result.
        max_shard_bytes: Most bytes of tensors in a file.
        save_format: PADDLE or HUGGING_FACE: names and shapes of the result.
        overwrite: Whether the result of an earlier merge is replaced.
        verify: Whether the hashes of the checkpoint's manifest are checked, not only the sizes.
        checks_replicas: Whether what all ranks hold must be equal.
    """

    source: Path
    output: Path
    max_shard_bytes: int = 5 * 10**9
    save_format: str = PADDLE
    overwrite: bool = False
    verify: bool = False
    checks_replicas: bool = True


def main(argv: Sequence[str] | None = None) -> None:
    """Merges what the command line names."""
    merge(parse_options(argv))


def merge(options: MergeOptions) -> None:
    """Writes the whole model or adapter and says what was written.

    Raises:
        UserError: The checkpoint is incomplete or of several runs, or there is no room for the result.
    """
    began = time.monotonic()
    if not options.source.is_dir():
        raise UserError(
            f"--model_name_or_path {options.source} is no folder: give the folder that holds the weights"
        )
    check_output(options.output, [options.source], overwrite=options.overwrite)
    _check_manifest(options.source, verify=options.verify)
    source = open_source(options.source)
    tensors = source.tensors(checks_replicas=options.checks_replicas)
    record = {
        "source": str(options.source),
        "kind": source.kind,
        "tensor_parallel_degree": source.files.tensor_degree,
        "pipeline_parallel_degree": source.files.pipeline_degree,
    }
    is_theirs = options.save_format == HUGGING_FACE
    with output_folder(options.output, record) as folder:
        companions.copy_companions(options.source, folder)
        copy_files_of_others(options.source, folder)
        carry_template([options.source], folder)
        written = hf_out.convert(tensors, folder, options.source) if is_theirs else tensors
        with show_progress(sum(map(count_bytes, written))) as advance:
            layout = _layout(source.kind, options.max_shard_bytes, "pt" if is_theirs else "np")
            files = write_tensors(folder, written, layout, advance=advance)
    _report(options, source, written, num_files=len(files), seconds=time.monotonic() - began)
    if is_theirs and (line := hf_out.describe_needed_code(options.output, _family_of(options.output))):
        print_text(line)


def _family_of(folder: Path) -> Family:
    return find_family(text_part(read_json_if_present(folder / "config.json")), folder)


def _check_manifest(folder: Path, *, verify: bool) -> None:
    manifest = read_json_if_present(folder / MANIFEST_NAME)
    for name, facts in manifest.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, but {MANIFEST_NAME} names it: copy the checkpoint again")
        if path.stat().st_size != facts["size"]:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes, but {MANIFEST_NAME} tells of {facts['size']}: copy the "
                "checkpoint again"
            )
    if verify:
        if not manifest:
            raise UserError(f"--verify needs {folder / MANIFEST_NAME}, which is not there: leave it out")
        if fault := find_fault(folder):
            raise UserError(f"{folder}: {fault}. Copy the checkpoint again")


def _layout(kind: str, max_shard_bytes: int, header: str) -> Layout:
    if kind == MODEL:
        return Layout(max_shard_bytes=max_shard_bytes, format=header)
    name = "lora" if kind == LORA else "ptuning"
    return Layout("peft_model", max_shard_bytes, header, always_numbered=True, index_facts=(("type", name),))


def _report(
    options: MergeOptions, source: Source, tensors: Sequence[Tensor], *, num_files: int, seconds: float
) -> None:
    files = source.files
    origin = "a whole checkpoint"
    if not files.is_whole:
        origin = f"tensor-parallel degree {files.tensor_degree}, pipeline degree {files.pipeline_degree}"
    size = sum(map(count_bytes, tensors)) / 1e9
    print_text(
        f"merged {source.kind} from {options.source} ({origin})",
        f"wrote {options.output}: {len(tensors)} tensors, {size:.3g} GB in {num_files} "
        f"file{'s' * (num_files > 1)}, {seconds:.1f} s",
    )
    output = str(options.output)
    commands = {
        MODEL: (PREDICT, ["--model_name_or_path", output]),
        LORA: (MERGE_LORA, ["--lora_path", output, "--merge_model_path", f"{output}-merged"]),
        PREFIX: (PREDICT, ["--model_name_or_path", "BASE", "--prefix_path", output]),
    }
    print_text(f"next: {next_command(*commands[source.kind])}")


def parse_options(argv: Sequence[str] | None = None) -> MergeOptions:
    """Reads the command line; a wrong one ends the process with code 2."""
    parser = CommandParser(
        prog=usage_name(MERGE_RANKS),
        description="Merges the files of all tensor- and pipeline-parallel ranks into one model or adapter.",
    )
    parser.add_argument("--model_name_or_path", type=Path, required=True, metavar="CKPT",
                        help="folder with the files of the ranks, or with a whole checkpoint")  # fmt: skip
    parser.add_argument(
        "--output_dir",
        "--output_path",
        type=Path,
        metavar="OUT",
        help="folder of the result (default: CKPT-merged)",
    )
    add_output_options(parser)
    parser.add_argument("--save_format", choices=(HUGGING_FACE, PADDLE), default=PADDLE,
                        help="names and shapes of the result (default: paddle)")  # fmt: skip
    add_switch(parser, "--verify", "check the hashes of the checkpoint's manifest, too, not only the sizes")
    parser.add_argument("--differing_replicas", choices=("refuse", "first"), default="refuse",
                        help="what to do where ranks disagree on a tensor that each holds whole: refuse, or "
                             "take the first rank's (default: refuse)")  # fmt: skip
    args = parser.parse_args(argv)
    source = Path(str(args.model_name_or_path))
    return MergeOptions(
        source=source,
        output=args.output_dir or source.absolute().with_name(f"{source.absolute().name}-merged"),
        max_shard_bytes=args.max_shard_size,
        save_format=args.save_format,
        overwrite=args.overwrite,
        verify=args.verify,
        checks_replicas=args.differing_replicas == "refuse",
    )
