"""What is known of Paddle's operators (`paddle._C_ops`) where half precision is concerned.

An operator that is in none of these sets computes in float32 and rounds all float32 results to the type of its
half-precision inputs; half precision and float32 together are refused, as a GPU's kernel refuses them.
"""

from __future__ import annotations

DATA_MOVING = frozenset((
    "cast", "cast_", "assign", "assign_", "assign_out_", "reshape", "reshape_", "transpose", "transpose_",
    "squeeze", "squeeze_", "unsqueeze", "unsqueeze_", "flatten", "flatten_", "slice", "split",
    "split_with_num", "full_like", "empty_like", "full", "full_", "zeros", "ones", "zeros_like",
    "ones_like", "full_with_tensor", "empty", "numel", "shape", "shape64", "is_empty", "view_shape",
    "view_dtype", "view_slice", "as_strided", "share_data", "tensor_unfold", "data", "memcpy_h2d",
    "memcpy_d2h", "copy_to", "stack", "unbind", "expand", "strided_slice", "fill", "fill_",
    "set_value", "set_value_", "set_value_with_tensor", "set_value_with_tensor_", "share_buffer",
    "isfinite", "isinf", "isnan", "contiguous", "is_contiguous", "depend", "print",
))  # fmt: skip
"""Have half-precision kernels on CPU, forward and backward; they copy numbers, so there is nothing to round."""

PROMOTING = frozenset((
    "add", "subtract", "multiply", "divide", "floor_divide", "remainder", "elementwise_pow", "maximum",
    "minimum", "fmax", "fmin", "where", "equal", "not_equal", "less_than", "less_equal", "greater_than",
    "greater_equal", "isclose", "allclose", "equal_all", "lerp", "addmm_add",
))  # fmt: skip
"""Paddle promotes their inputs to the wider type."""

MIXED = {
    "layer_norm": 1,
    "rms_norm": 1,
    "group_norm": 1,
    "fused_rms_norm": 1,
    "put_along_axis": 1,
    "index_put": 1,
    "scatter": 1,
    "check_finite_and_unscale_": 0,
    "update_loss_scaling_": 0,
}
"""Take float32 beside half precision (weights of norms, statistics), and how many of their results have the type of
the first input; the others stay float32. (GPU kernels of `scatter` and the like cast what is written.)"""

DTYPE_PLACE = {"sum": 2, "cumsum": None, "prod": None}
"""Operators with an argument `dtype` that sets the type of the result, and its place where it comes without its name."""

OLD_NAMES = {
    "add": "elementwise_add",
    "subtract": "elementwise_sub",
    "multiply": "elementwise_mul",
    "divide": "elementwise_div",
    "maximum": "elementwise_max",
    "minimum": "elementwise_min",
    "remainder": "elementwise_mod",
    "floor_divide": "elementwise_floordiv",
    "matmul": "matmul_v2",
    "sum": "reduce_sum",
    "mean": "reduce_mean",
    "prod": "reduce_prod",
    "max": "reduce_max",
    "min": "reduce_min",
    "embedding": "lookup_table_v2",
    "cross_entropy_with_softmax": "softmax_with_cross_entropy",
    "p_norm": "pnorm",
    "bicubic_interp": "bicubic_interp_v2",
    "bilinear_interp": "bilinear_interp_v2",
    "linear_interp": "linear_interp_v2",
    "nearest_interp": "nearest_interp_v2",
    "trilinear_interp": "trilinear_interp_v2",
}
"""Names of operators in Paddle's lists for mixed precision, where they are not those of `paddle._C_ops`."""

WITHOUT_OPERATOR = frozenset(
    {"cross_entropy", "cross_entropy2", "lookup_table", "mul", "softmin", "triplet_margin_loss"}
)
"""Names in Paddle's lists that no operator of `paddle._C_ops` has any more."""

NEVER_CAST = frozenset({
    "cast", "cast_", "assign_out_", "adamw_", "check_finite_and_unscale_", "update_loss_scaling_"
})  # fmt: skip
"""What `auto_cast` leaves alone: what names its types itself, and optimizers, which work outside of it."""


def names_in_lists(name: str) -> set[str]:
    """The names under which Paddle's lists for mixed precision may hold an operator."""
    return {name, OLD_NAMES.get(name, name), name.removesuffix("_"), f"{name}_v2"}
