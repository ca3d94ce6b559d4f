"""What Paddle's operators do with half-precision inputs, as tables of their names in `paddle._C_ops`.

An operator that stands in no table takes floating-point inputs of one dtype, computes in float32, and returns that
dtype; other dtypes together are refused, as GPU kernels do, which are compiled for one element type at a time.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVES_DATA = _names(
    """
    as_strided assign assign_ assign_out_ cast cast_ contiguous copy_to data empty empty_like fill fill_
    flatten flatten_ full full_ full_like full_with_tensor memcpy_d2h memcpy_h2d numel ones ones_like
    reshape reshape_ shape shape64 share_data share_data_ slice split split_with_num squeeze squeeze_
    stack strided_slice transpose transpose_ unbind unsqueeze unsqueeze_ view_dtype view_shape
    view_slice zeros zeros_like
    """
)
"""Half-precision kernels exist on CPU, both ways, and nothing is computed in them: they are called as they are."""

CHECKS_ITSELF = frozenset({"isfinite", "isinf", "isnan", "isfinite_v2", "check_numerics"})
"""Half-precision kernels exist on CPU, and there is no gradient."""

PROMOTES = _names(
    """
    add subtract multiply divide floor_divide remainder trunc_divide elementwise_pow maximum minimum fmax fmin
    atan2 copysign nextafter cross huber_loss where equal not_equal less_than less_equal greater_than
    greater_equal logical_and logical_or logical_xor
    """
)
"""Paddle converts inputs of different floating-point dtypes to the wider one, also where the first is written."""

SCALARS_GIVE_WAY = _names(
    """
    add subtract multiply divide remainder elementwise_pow copysign equal not_equal less_than less_equal
    greater_than greater_equal
    """
)
"""Of these, a 0-d tensor is converted to the dtype of the other one, unless the first is written."""

MIXES = {
    "layer_norm": "weights of float32 beside a half-precision input",
    "rms_norm": "weights of float32 beside a half-precision input",
    "fused_rms_norm_ext": "weights of float32 beside a half-precision input",
    "fast_rms_norm": "weights of float32 beside a half-precision input",
    "fast_ln": "weights of float32 beside a half-precision input",
    "group_norm": "weights of float32 beside a half-precision input",
    "instance_norm": "weights of float32 beside a half-precision input",
    "batch_norm": "weights and running statistics of float32 beside a half-precision input",
    "batch_norm_": "weights and running statistics of float32 beside a half-precision input",
    "fused_linear_param_grad_add": "a float32 gradient to which half-precision products are added",
    "top_p_sampling": "a float32 threshold beside half-precision probabilities",
    "moe_combine": "float32 weights of experts beside half-precision outputs",
    "moe_gate_dispatch": "float32 gate values beside half-precision inputs",
}
"""GPU kernels take float32 beside half precision here, and return the dtype of the first input; with what."""

FLOAT32_OUTPUTS = {
    "rms_norm": (1,),
    "fused_rms_norm_ext": (1,),
    "fast_rms_norm": (1,),
    "fast_ln": (1, 2),
    "layer_norm": (1, 2),
    "batch_norm": (1, 2, 3, 4),
    "batch_norm_": (1, 2, 3, 4),
    "accuracy": (0,),
    "einsum": (),
}
"""Positions of outputs that are float32 whatever the inputs are: statistics, counts."""

SCALARS_AFTER_FIRST = _names(
    """
    clip clip_ cumsum full_like increment increment_ leaky_relu pow pow_ scale scale_
    """
)
"""Only the first argument is a tensor to compute with; a tensor after it stands for a number."""

SECOND_IS_WRITTEN = frozenset({"where_"})
"""Operators that write into their second argument; all others that end in "_" write into their first."""

ROUNDS_FIRST = frozenset({"sum"})
"""Operators whose `dtype` is what the input is converted to before anything is computed."""

NO_AUTO_CAST = frozenset(
    {"cast", "copy_to", "shape", "shape64", "numel", "is_empty", "data", "check_numerics"}
)
"""`paddle.amp.auto_cast` leaves these alone, and all that write into their input."""

CASTS_FIRST_ONLY = frozenset({"layer_norm", "batch_norm", "sync_batch_norm_"})
"""`paddle.amp.auto_cast` looks at, and converts, the first input only."""

SCALAR_METHODS = {
    "__add__": "scale",
    "__radd__": "scale",
    "__sub__": "scale",
    "__rsub__": "scale",
    "__mul__": "scale",
    "__rmul__": "scale",
    "__div__": "scale",
    "__truediv__": "scale",
    "__pow__": "pow",
}
"""What arithmetic of a tensor and a number calls; where it calls the operator for two tensors it is left out."""

METHODS = {
    "__add__": "add",
    "__radd__": "add",
    "__sub__": "subtract",
    "__rsub__": "subtract",
    "__mul__": "multiply",
    "__rmul__": "multiply",
    "__div__": "divide",
    "__rdiv__": "divide",
    "__truediv__": "divide",
    "__rtruediv__": "divide",
    "__floordiv__": "floor_divide",
    "__rfloordiv__": "floor_divide",
    "__mod__": "remainder",
    "__rmod__": "remainder",
    "__pow__": "elementwise_pow",
    "__rpow__": "elementwise_pow",
    "__matmul__": "matmul",
    "__rmatmul__": "matmul",
    "__gt__": "greater_than",
    "__ge__": "greater_equal",
    "__lt__": "less_than",
    "__le__": "less_equal",
    "__eq__": "equal",
    "__ne__": "not_equal",
}
"""Methods of tensors that are written in C++, and so do not come by `paddle._C_ops`, and the operators they call."""
