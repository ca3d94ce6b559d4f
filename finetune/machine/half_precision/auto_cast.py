"""The dtype that `paddle.amp.auto_cast` has an operator compute in.

Paddle decides this in C++, with a table of the kernels that were compiled for GPUs. Compiled for CPU the table is
empty, so that any operator under `auto_cast` would get float32. So the state that `auto_cast` sets is kept here, out
of sight of the C++ code, and the decision is made here by the same rules:

1. An operator of the white list computes in half precision, one of the black list in float32. At level O2 without
   `use_promote` all but the black list compute in half precision; at level OD all but the white list in float32.
2. Every other operator computes in float32 if one of its inputs is float32, otherwise in half precision. Of the
   norms, only the first input is looked at and converted.

The lists know operators by the names of Paddle's first API ("matmul_v2" for `matmul`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from paddle.base import core

from finetune.machine.half_precision.operators import CASTS_FIRST_ONLY
from finetune.machine.half_precision.tensor_types import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, to_dtype


class AutoCastState:
    """What `paddle.amp.auto_cast` has set for the block that is running.

    Attributes:
        level: Paddle's level.
        enabled: Whether the level is not O0.
        dtype_name: Of the half precision.
        use_promote: See the rules above.
        white: Names of operators that compute in half precision.
        black: Names of operators that compute in float32.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As before the first `auto_cast`."""
        self.set_level(core.AmpLevel.O0)
        self.dtype_name, self.use_promote = "float32", True
        self.white: set[str] = set()
        self.black: set[str] = set()

    def set_level(self, level: Any) -> None:
        """Sets the level."""
        self.level, self.enabled = level, level != core.AmpLevel.O0


state = AutoCastState()


def list_names() -> dict[str, str]:
    """Names of operators in Paddle's lists, by their names in `paddle._C_ops`, where the two differ."""
    from paddle.incubate.autograd.phi_ops_map import op_map

    return {facts["phi_name"]: name for name, facts in op_map.items() if facts["phi_name"] != name}


def decide(name: str, listed: str, tensors: list[Any]) -> Any:
    """The dtype that an operator computes in.

    Args:
        name: In `paddle._C_ops`.
        listed: In Paddle's lists.
        tensors: Its floating-point inputs in order, at least one.

    Returns:
        A dtype.
    """
    half = FLOAT16 if state.dtype_name == "float16" else BFLOAT16
    if listed in state.black:
        return FLOAT32
    if listed in state.white or (state.level == core.AmpLevel.O2 and not state.use_promote):
        return half
    if state.level == core.AmpLevel.OD:
        return FLOAT32
    deciding = tensors[:1] if name in CASTS_FIRST_ONLY else tensors
    return FLOAT32 if any(tensor.dtype is FLOAT32 for tensor in deciding) else half


def converter(name: str, tensors: list[Any], dtype: Any) -> Any:
    """The function that converts an operator's inputs to the dtype decided on.

    Args:
        name: In `paddle._C_ops`.
        tensors: Its floating-point inputs in order.
        dtype: What `decide` returned.

    Returns:
        A function of a tensor; float64 stays, as in Paddle.
    """
    only = tensors[0] if name in CASTS_FIRST_ONLY else None

    def convert_input(tensor: Any) -> Any:
        if tensor.dtype is FLOAT64 or (only is not None and tensor is not only):
            return tensor
        return to_dtype(tensor, dtype)

    return convert_input


def tracer_attributes() -> dict[str, Any]:
    """Attributes of Paddle's `Tracer` through which `auto_cast` and recomputation set and read the state."""

    def set_lists(_: Any, white: Iterable[str], black: Iterable[str]) -> None:
        state.white, state.black = set(white), set(black)

    return {
        "_amp_level": property(lambda _: state.level, lambda _, level: state.set_level(level)),
        "_amp_dtype": property(
            lambda _: state.dtype_name, lambda _, dtype: setattr(state, "dtype_name", dtype)
        ),
        "_use_promote": property(
            lambda _: state.use_promote, lambda _, value: setattr(state, "use_promote", value)
        ),
        "_set_amp_op_list": set_lists,
        "_get_amp_op_list": lambda _: (set(state.white), set(state.black)),
    }


class GpuTracer:
    """Paddle's tracer, for the modules of `paddle.amp` that ask it for the device: its place says GPU."""

    def __init__(self, tracer: Any):
        object.__setattr__(self, "_tracer", tracer)

    def __getattr__(self, name: str) -> Any:
        return GpuPlace() if name == "_expected_place" else getattr(self._tracer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tracer, name, value)


class GpuPlace:
    """Answers as the place of a GPU does."""

    def is_gpu_place(self) -> bool:
        """Yes."""
        return True

    def is_xpu_place(self) -> bool:
        """No."""
        return False

    is_custom_place = is_cpu_place = is_xpu_place
