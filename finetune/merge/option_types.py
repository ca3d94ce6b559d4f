"""Options on the command line that both merges have, and their types."""

from __future__ import annotations

import argparse
import re

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_DEVICES = ("cpu", "gpu", "npu", "xpu", "mlu", "gcu", "intel_hpu")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "1.5GiB" or a number; for argparse."""
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: write a number and KB, MB, GB, KiB, MiB or GiB"
        )
    return size


def parse_bool(text: str) -> bool:
    """What "true", "no" or "1" mean; for argparse."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds what both merges let users choose about the result."""
    parser.add_argument("--device", choices=_DEVICES, default="cpu",
                        help="accepted for old scripts: a merge is limited by the disk and runs on the CPU")  # fmt: skip
    add_switch(parser, "--low_gpu_mem", "accepted for old scripts: no memory of a GPU is used")
    parser.add_argument("--max_shard_size", type=parse_size, default=5 * 10**9, metavar="SIZE",
                        help="most bytes of tensors in a file, such as 5GB or 500MiB (default: 5GB)")  # fmt: skip
    add_switch(parser, "--overwrite", "replace the result of an earlier merge")


def add_switch(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """Adds an option that is false, true, or given alone, which means true."""
    parser.add_argument(
        name, type=parse_bool, nargs="?", const=True, default=False, metavar="true|false", help=text
    )
