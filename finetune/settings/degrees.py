"""What is wrong with the degrees of parallelism that were asked for, before any process meets another."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.machine.command_names import TRAIN, launched_name
from finetune.machine.device import detect_device, device_kind
from finetune.processes.layout import SHARDING_STAGES, Layout, count_processes, split_processes

_LAUNCHER = "python -m paddle.distributed.launch"
_CARDS_PER_NODE = 8
_DEGREES = ("tensor_parallel_degree", "pipeline_parallel_degree", "sharding_parallel_degree")

Faults = Iterator[tuple[tuple[str, ...], str]]


def check_degrees(values: Mapping[str, Any]) -> Faults:
    """The faults of the degrees and of `sharding`, each with the names of the settings it depends on.

    Args:
        values: Settings by name.
    """
    yield from _check_sharding(values)
    yield from _check_processes(values)


def layout_of(values: Mapping[str, Any]) -> Layout | None:
    """How the processes of this run are spread over the axes; None where the degrees do not fit their number.

    Args:
        values: Settings by name.
    """
    tensor, pipeline, sharding = (values[name] for name in _DEGREES)
    return split_processes(
        count_processes(),
        tensor=tensor,
        pipeline=pipeline,
        sharding=sharding,
        sharded=bool(values["sharding"]),
    )


def _check_sharding(values: Mapping[str, Any]) -> Faults:
    sharding, degree = values["sharding"], values["sharding_parallel_degree"]
    words = (sharding or "").split()
    stages = [word for word in words if word in SHARDING_STAGES]
    if words and (len(stages) != 1 or len(words) > 2 or set(words) - {*stages, "offload"}):
        yield ("sharding",), f'sharding is "{sharding}": choose stage1, stage2 or stage3'
    elif "offload" in words:
        remedy = "" if stages == ["stage3"] else "use stage3, "
        yield (
            ("sharding",),
            f'sharding is "{sharding}", but keeping the state in host memory is not available: '
            f"remove offload; if memory is short, {remedy}raise sharding_parallel_degree, or set recompute true",
        )
    if degree > 1 and not words:
        yield (
            ("sharding", "sharding_parallel_degree"),
            f"sharding_parallel_degree is {degree}, but sharding does not say what to share out: "
            "add --sharding stage1 (or stage2, stage3), or remove the degree to train plain replicas",
        )


def _check_processes(values: Mapping[str, Any]) -> Faults:
    if layout_of(values):
        return
    num_processes = count_processes()
    split = {name: values[name] for name in _DEGREES if values[name] > 1}
    if not values["sharding"]:
        split.pop("sharding_parallel_degree", None)
    needed = math.prod(split.values())
    alone = " ".join(f"--{name} 1" for name in split)
    if num_processes == 1:
        present, otherwise = "1 process", f"on one process with {alone}"
    else:
        present, otherwise = f"{num_processes} processes", f"as {num_processes} replicas with {alone}"
    yield (
        ("sharding", *_DEGREES),
        f"{' x '.join(f'{name} {degree}' for name, degree in split.items())} needs {needed} processes or a multiple, "
        f"this run has {present}: start it with `{_write_launch_command(values, needed)}`, or {otherwise}",
    )


def _write_launch_command(values: Mapping[str, Any], num_processes: int) -> str:
    if device_kind(detect_device(values["device"])) == "cpu":
        return f"{_LAUNCHER} --nproc_per_node {num_processes} {launched_name(TRAIN)} ARGS.json --device cpu"
    num_nodes = math.ceil(num_processes / _CARDS_PER_NODE)
    cards = ",".join(str(card) for card in range(min(num_processes, _CARDS_PER_NODE)))
    nodes = f"--nnodes {num_nodes} " if num_nodes > 1 else ""
    return f"{_LAUNCHER} {nodes}--gpus {cards} {launched_name(TRAIN)} ARGS.json"
