"""Tensor-parallel operators on CPU processes, in place of those that Paddle compiles for GPUs only.

Every function stands for one function of `paddle.distributed.fleet.layers.mpu.mp_ops`, takes its arguments and has
its gradient. n is the number of ranks in the group; "the same" below means the same on all of them. This module
imports Paddle, so only `cpu_backend.install` imports it.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer


def identity(tensor: Any, group: Any = None, skip_c_identity_dynamic: bool = False) -> Any:
    """Stands for `mp_ops._c_identity`, which calls the GPU operator `c_identity`.

    Forward returns the tensor, the same on all ranks; backward sums the gradients of the n branches that it feeds.
    """
    group = _group_or_world(group)
    return tensor if group.nranks == 1 else _Identity.apply(tensor, group)


def all_reduce(
    tensor: Any,
    op: int = dist.ReduceOp.SUM,
    group: Any = None,
    use_calc_stream: bool = True,
    use_model_parallel: bool = True,
    skip_c_identity_dynamic: bool = False,
) -> Any:
    """Stands for `mp_ops._mp_allreduce`, whose backward calls the GPU operator `c_identity`.

    Forward sums the partial results of the ranks; backward hands the gradient, the same on all ranks, to each.
    """
    if op != dist.ReduceOp.SUM:
        raise ValueError("the tensor-parallel all-reduce can only sum")
    group = _group_or_world(group)
    return tensor if group.nranks == 1 else _AllReduce.apply(tensor, group)


def concatenate(tensor: Any, group: Any = None) -> Any:
    """Stands for `mp_ops._c_concat`, which calls the GPU operator `c_concat`.

    Forward joins the slices [..., d] of all ranks to [..., n * d]; backward takes this rank's slice of the gradient,
    which is the same on all ranks because what follows is.
    """
    group = _group_or_world(group)
    return tensor if group.nranks == 1 else _Concatenate.apply(tensor, group)


def split(tensor: Any, group: Any = None) -> Any:
    """Stands for `mp_ops._c_split`, which calls the GPU operator `c_split`.

    Forward takes this rank's slice [..., d] of a tensor [..., n * d]; backward joins the slices' gradients along the
    last dim. (Paddle's own backward joins them along the first one, which fits no gradient of this forward.)
    """
    group = _group_or_world(group)
    return tensor if group.nranks == 1 else _Split.apply(tensor, group)


def softmax_with_cross_entropy(
    logits: Any, label: Any, group: Any = None, return_softmax: bool = False, ignore_index: int = -100
) -> Any:
    """Stands for `mp_ops._c_softmax_with_cross_entropy`, a GPU operator of the same name.

    Args:
        logits: This rank's slice [..., v] of logits over a vocabulary of n * v.
        label: Whole-vocabulary indices, [...] or [..., 1].
        group: The tensor-parallel group.
        return_softmax: Also return this rank's slice of the probabilities.
        ignore_index: The label whose loss and gradient are 0.

    Returns:
        Loss [..., 1], the same on all ranks; with `return_softmax`, also the probabilities [..., v], which carry no
        gradient. Both have the dtype of the logits; half precision is computed in float32 and rounded at the end.
    """
    group = _group_or_world(group)
    if label.ndim == logits.ndim - 1:
        label = label.unsqueeze(-1)
    dtype = logits.dtype
    is_half = dtype in (paddle.bfloat16, paddle.float16)
    loss, softmax = _CrossEntropy.apply(
        logits.astype("float32") if is_half else logits, label, group, ignore_index
    )
    if is_half:
        loss, softmax = loss.astype(dtype), softmax.astype(dtype)
    return (loss, softmax) if return_softmax else loss


def _group_or_world(group: Any) -> Any:
    """A group, or that of all ranks where none is given, as in Paddle."""
    return dist.get_group(0) if group is None else group


def _sum(tensor: Any, group: Any, op: Any = dist.ReduceOp.SUM) -> Any:
    """A new tensor with the reduction over the group; the argument may be shared, so it is left alone."""
    total = tensor.clone().detach()
    if group.nranks > 1:
        dist.all_reduce(total, op=op, group=group)
    return total


def _join(tensor: Any, group: Any) -> Any:
    """The slices of all ranks side by side along the last dim."""
    parts: list[Any] = []
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return paddle.concat(parts, axis=-1)


def _slice(tensor: Any, group: Any) -> Any:
    """This rank's slice along the last dim."""
    return paddle.split(tensor, group.nranks, axis=-1)[group.rank].contiguous()


class _Identity(PyLayer):
    @staticmethod
    def forward(ctx: Any, tensor: Any, group: Any) -> Any:
        ctx.group = group
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _sum(grad, ctx.group)


class _AllReduce(PyLayer):
    @staticmethod
    def forward(ctx: Any, tensor: Any, group: Any) -> Any:
        return _sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.clone()


class _Concatenate(PyLayer):
    @staticmethod
    def forward(ctx: Any, tensor: Any, group: Any) -> Any:
        ctx.group = group
        return _join(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _slice(grad, ctx.group)


class _Split(PyLayer):
    @staticmethod
    def forward(ctx: Any, tensor: Any, group: Any) -> Any:
        ctx.group = group
        return _slice(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _join(grad, ctx.group)


class _CrossEntropy(PyLayer):
    @staticmethod
    def forward(ctx: Any, logits: Any, label: Any, group: Any, ignore_index: int) -> Any:
        vocab_slice = logits.shape[-1]
        largest = _sum(logits.max(axis=-1, keepdim=True), group, dist.ReduceOp.MAX)
        shifted = logits - largest  # [..., v], at most 0: exp cannot overflow
        softmax = paddle.exp(shifted)
        total = _sum(softmax.sum(axis=-1, keepdim=True), group)  # [..., 1]
        softmax /= total
        # The rank whose slice holds the label gives its logit, the others give 0.
        local = label.astype("int64") - group.rank * vocab_slice
        held = (local >= 0) & (local < vocab_slice) & (label != ignore_index)
        index = paddle.where(held, local, paddle.zeros_like(local))
        chosen = paddle.take_along_axis(shifted, index, axis=-1) * held.astype(logits.dtype)
        counted = (label != ignore_index).astype(logits.dtype)
        loss = (paddle.log(total) - _sum(chosen, group)) * counted
        ctx.save_for_backward(softmax, index, held.astype(logits.dtype), counted)
        ctx.mark_non_differentiable(softmax)
        return loss, softmax

    @staticmethod
    def backward(ctx: Any, grad: Any, _softmax_grad: Any = None) -> Any:
        softmax, index, held, counted = ctx.saved_tensor()
        grad = grad * counted  # [..., 1]
        logits_grad = softmax * grad
        return paddle.put_along_axis(logits_grad, index, -grad * held, axis=-1, reduce="add"), None
