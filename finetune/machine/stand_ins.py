"""Everything in Paddle and PaddleNLP that this project replaces in a running process, and why.

    python -m finetune.stand_ins        # prints the list

A stand-in takes the place of an attribute of somebody else's module or class. All of them are put in place through
`replace` or `replaced` here, which refuse a target that is not in `STAND_INS`, so the list below is complete; a test
compares Paddle's and PaddleNLP's modules before and after. Classes of ours that derive from theirs are no stand-ins:
they are chosen by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from finetune.machine.command_parser import CommandParser


@dataclass(frozen=True)
class StandIn:
    """A replaced attribute.

    Attributes:
        target: Dotted path of the attribute; `*` stands for any name.
        when: In which runs it is replaced.
        reason: What is wrong or missing there.
        versions: Of Paddle or PaddleNLP in which that was seen.
        test: The test that shows the difference.
    """

    target: str
    when: str
    reason: str
    versions: str
    test: str


_PADDLE, _PADDLENLP = "paddlepaddle 3.3.1", "paddlenlp 3.0.0b4"
_SEVERAL = "several processes on CPU"
_BACKEND_TEST = "tests/distributed/test_cpu_backend.py"
_LAYERS_TEST = "tests/families/test_cpu_layers.py"
_FLOAT32_TEST = "tests/models/test_float32.py"


def _tensor_parallel_operators() -> Iterator[StandIn]:
    for module in ("paddle.distributed.fleet.layers.mpu.mp_ops", "paddle.distributed.collective"):
        for name in (
            "_c_identity", "_mp_allreduce", "_c_concat", "_c_split", "_c_softmax_with_cross_entropy"
        ):  # fmt: skip
            yield StandIn(
                f"{module}.{name}", _SEVERAL, "the operator is compiled for GPUs only", _PADDLE, _BACKEND_TEST
            )
    yield StandIn(
        "paddle._legacy_C_ops.c_identity",
        _SEVERAL,
        "the operator, which tensor-parallel layers call under enable_mp_async_allreduce, is compiled for GPUs only",
        _PADDLE,
        "tests/distributed/test_tensor_words.py",
    )


def _process_groups() -> Iterator[StandIn]:
    for module in ("paddle.distributed.collective", "paddle.distributed.parallel"):
        yield StandIn(
            f"{module}._new_process_group_impl",
            _SEVERAL,
            "gloo refuses a second group, gives up after 30 s, and hangs on messages among three or more ranks",
            _PADDLE,
            _BACKEND_TEST,
        )
    yield StandIn(
        "paddle.base.*.create_or_get_global_tcp_store",
        _SEVERAL,
        "holds the interpreter while it waits for other ranks, so that nothing notices when one of them dies",
        _PADDLE,
        "tests/distributed/test_watch.py",
    )
    for module in ("paddle.distributed", "paddle.distributed.collective"):
        yield StandIn(
            f"{module}.new_group",
            _SEVERAL,
            "the maker of a group is not told which ranks belong to it",
            _PADDLE,
            _BACKEND_TEST,
        )
    yield StandIn(
        "paddle.distributed.parallel.ParallelEnv._device_id",
        _SEVERAL,
        "read on any device, but set only where Paddle was compiled for an accelerator",
        _PADDLE,
        _BACKEND_TEST,
    )


def _received_objects() -> Iterator[StandIn]:
    communication = "paddle.distributed.communication"
    for module in (
        *(f"{communication}.{name}" for name in ("serialization_utils", "all_gather", "broadcast", "recv", "scatter")),
        "paddle.distributed.fleet.meta_parallel.pp_utils.p2p_communication",
    ):  # fmt: skip
        yield StandIn(
            f"{module}.convert_tensor_to_object",
            "several processes",
            "unpickles what arrives over the network",
            _PADDLE,
            "tests/distributed/test_groups.py",
        )


def _cpu_layers() -> Iterator[StandIn]:
    llama = "paddlenlp.transformers.llama.modeling"
    for name in (
        "LlamaRMSNorm.forward", "apply_rotary_pos_emb", "scaled_dot_product_attention", "swiglu"
    ):  # fmt: skip
        yield StandIn(
            f"{llama}.{name}",
            "float32 on CPU",
            "written in forms that Paddle's CPU kernels compute 10 to 150 times more slowly",
            _PADDLENLP,
            _LAYERS_TEST,
        )


def _attention_and_positions() -> Iterator[StandIn]:
    models = "paddlenlp.transformers"
    yield StandIn(
        f"{models}.*.modeling.scaled_dot_product_attention",
        "always",
        "hands a kernel a dense mask and is_causal together, which Paddle takes as causal alone, or adds masks and "
        "distances in half precision",
        _PADDLENLP,
        "tests/models/test_attention.py",
    )
    yield StandIn(
        f"{models}.*.modeling.apply_rotary_pos_emb",
        "always",
        "turns positions by tables rounded to half precision, and rounds every step of the turn",
        _PADDLENLP,
        _FLOAT32_TEST,
    )


def _half_precision() -> Iterator[StandIn]:
    for target, reason, test in (
        (
            "paddle._C_ops.*",
            "most operators have no kernel for bfloat16 and float16 on CPU; modules that import them by name have the "
            "stand-ins, too",
            "test_operators.py",
        ),
        (
            "paddle._legacy_C_ops.check_finite_and_unscale",
            "no kernel for bfloat16 and float16 on CPU",
            "test_loss_scaling.py",
        ),
        (
            "paddle.Tensor.__*__",
            "arithmetic of tensors is written in C++ and calls the operators past paddle._C_ops",
            "test_methods.py",
        ),
        (
            "paddle.Tensor._?etitem_dygraph",
            "indexing is written in C++ and calls operators without half-precision gradients on CPU",
            "test_methods.py",
        ),
        (
            "paddle.base.dygraph.tracer.Tracer._*amp_*",
            "compiled without GPU, auto_cast has every operator compute in float32",
            "test_auto_cast.py",
        ),
        (
            "paddle.base.dygraph.tracer.Tracer._use_promote",
            "the same",
            "test_auto_cast.py",
        ),
        (
            "paddle.amp.auto_cast._dygraph_tracer",
            "auto_cast and decorate are refused where the device is no accelerator",
            "test_auto_cast.py",
        ),
        (
            "paddle.amp.auto_cast._is_gpu_*float16_supported",
            "asks the GPU for its compute capability",
            "test_auto_cast.py",
        ),
        (
            "paddle.amp.grad_scaler._dygraph_tracer",
            "GradScaler turns itself off where the device is no accelerator",
            "test_loss_scaling.py",
        ),
    ):
        yield StandIn(
            target, "rehearse_half_precision on CPU", reason, _PADDLE, f"tests/machine/half_precision/{test}"
        )


STAND_INS: tuple[StandIn, ...] = (
    StandIn(
        "paddle.nn.functional.dropout",
        "training with dropout, for the time of a forward or backward pass",
        "its masks follow the order of all draws, and so micro-batches, packing and layout, instead of the samples",
        _PADDLE,
        "tests/machine/randomness/test_dropout.py",
    ),
    StandIn(
        "paddlenlp.transformers.tokenizer_utils.ChatTemplateMixin.init_chat_template",
        "while a tokenizer is loaded",
        "compiles the folder's jinja template, which may take all time and memory there is and is not needed here",
        _PADDLENLP,
        "tests/tokenizers/test_tokenizer.py",
    ),
    *_process_groups(),
    *_tensor_parallel_operators(),
    *_received_objects(),
    *_cpu_layers(),
    *_attention_and_positions(),
    *_half_precision(),
)


def find(target: str) -> StandIn | None:
    """The entry that covers a dotted path, or None."""
    return next((each for each in STAND_INS if fnmatchcase(target, each.target)), None)


def replace(owner: Any, name: str, value: Any) -> Any:
    """Puts a stand-in in place, for good.

    Args:
        owner: A module or class of Paddle or PaddleNLP.
        name: Its attribute.
        value: What takes its place.

    Returns:
        What stood there before; None for nothing.

    Raises:
        ValueError: The list does not know the target.
    """
    _check_listed(f"{_path(owner)}.{name}")
    original = getattr(owner, name, None)
    setattr(owner, name, value)
    return original


def replace_import(module: Any, name: str, value: Any, *, source: str) -> None:
    """Puts a stand-in where a module has imported the replaced function by name.

    Args:
        module: Of Paddle or PaddleNLP.
        name: What it is called there.
        value: What takes its place.
        source: Dotted path of the function where it is defined, which the list knows.

    Raises:
        ValueError: The list does not know the source.
    """
    _check_listed(source)
    setattr(module, name, value)


def _check_listed(target: str) -> None:
    if find(target) is None:
        raise ValueError(
            f"{target} is not in finetune.machine.stand_ins.STAND_INS: add it there, with reason and test"
        )


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[Any]:
    """Puts a stand-in in place for the time of the block; yields what stood there before."""
    original = replace(owner, name, value)
    try:
        yield original
    finally:
        setattr(owner, name, original)


def _path(owner: Any) -> str:
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}"
    return str(owner.__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the list, by the runs in which each entry counts; entries with one reason stand together."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    description = (
        "Lists what is replaced in Paddle and PaddleNLP, in which runs, why, and the test that shows it."
    )
    CommandParser(prog="python -m finetune.stand_ins", description=description).parse_args(arguments)
    console = Console(highlight=False)
    groups: dict[str, dict[tuple[str, str, str], list[str]]] = {}
    for each in STAND_INS:
        facts = (each.reason, each.versions, each.test)
        groups.setdefault(each.when, {}).setdefault(facts, []).append(each.target)
    for when, entries in groups.items():
        console.print(Text(f"{when}\n", style="bold"), soft_wrap=True)
        for (reason, versions, test), targets in entries.items():
            for target in targets:
                console.print(Text(f"  {target}", style="cyan"), soft_wrap=True)
            console.print(Padding(Text(reason), (0, 0, 0, 6), expand=False))
            console.print(Text(f"      {versions}, shown by {test}\n", style="dim"), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
