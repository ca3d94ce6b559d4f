"""Dropout whose masks follow what is trained, not how it is laid out.

Paddle draws a mask from a generator, so that it depends on the order of all draws before it: on micro-batches,
packing, padding, and on how layers and tensors are divided among processes. Here every element of a mask is a
hash of its place in the run:

    seed, step, sample, position within the sample, layer, call within the layer, channel (or head and key)

Layers keep calling `paddle.nn.functional.dropout` (`nn.Dropout` does so, too); inside `KeyedDropout.active`
that function is the one here. Recomputed layers, and the slices of a tensor-parallel layer, thus find the mask
again without any stored state.

What this cannot reach is dropout inside fused GPU kernels: flash attention applies the family's attention
dropout itself, with masks from Paddle's generator (seeded per micro-batch, so a resumed run repeats them), and
those depend on the layout. Dropout of hidden states, of embeddings and of LoRA, and of attention computed by
plain operations, does not.

A hash is 64 bits wide where it is made on the host once per token (Steele, Lea and Flood, "Fast Splittable
Pseudorandom Number Generators", 2014, the SplitMix64 finalizer), and 32 bits wide per element (two rounds of
multiply and xor-shift, constants of C. Wellons' "lowbias32").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle.autograd import PyLayer
from paddle.nn import functional

from finetune.machine.randomness.seeding import derive_seed
from finetune.machine.stand_ins import replaced

Segments = Sequence[Sequence[tuple[int, int]]]

_GOLDEN_32, _GOLDEN_64 = 0x9E3779B1, 0x9E3779B97F4A7C15
_FACTORS = (0x7FEB352D, 0x846CA68B)
_SHIFTS = (16, 15)
# Elements hashed at a time on the host: few enough that they stay in the processor's cache.
_BLOCK = 1 << 16


class KeyedDropout:
    """Gives a model's dropouts their masks by place, only inside `active`.

    Outside of it (and where the model is not in training) Paddle's own dropout runs.

    Args:
        model: The model without its adapter's wrapper; its structured names must be those of the whole model.
        seed: The seed of the run.
        length_first: Whether hidden states are [length, batch, hidden] inside the model.
        tensor_degree: Ranks that share each tensor-parallel layer.
        tensor_rank: This process's place among them.
    """

    def __init__(
        self,
        model: Any,
        *,
        seed: int,
        length_first: bool = False,
        tensor_degree: int = 1,
        tensor_rank: int = 0,
    ):
        self.seed = seed
        self.length_first = length_first
        self.tensor_degree, self.tensor_rank = max(tensor_degree, 1), max(tensor_rank, 0)
        self._calls: list[list[Any]] = []  # [layer, dropouts so far] of every layer that is being computed
        self._step = 0
        self._segments: Segments = ()
        self._token_keys: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}  # by length of the rows
        self._original: Callable[..., Any] = functional.dropout
        self._split_inputs: set[str] = set()
        self._routers: dict[
            str, Any
        ] = {}  # layers whose parts see some of the tokens, by the start of their names
        self._is_needed = has_dropout(model)
        if self._is_needed:
            self._watch(model)

    def _watch(self, model: Any) -> None:
        """Keeps track of which layer is being computed, and of layers that see a slice of the channels."""
        for name, layer in model.named_sublayers(include_self=True):
            if hasattr(layer, "input_size_per_partition"):
                self._split_inputs.add(f"{name}.lora_dropout")
            if hasattr(layer, "passed_tokens"):
                self._routers[f"{name}."] = layer
            layer.register_forward_pre_hook(partial(self._enter, name))
            layer.register_forward_post_hook(self._leave)

    def _enter(self, name: str, _layer: Any, _inputs: Any) -> None:
        self._calls.append([name, 0])

    def _leave(self, _layer: Any, _inputs: Any, _output: Any) -> None:
        if self._calls:
            self._calls.pop()

    @contextmanager
    def active(self, step: int, segments: Segments) -> Iterator[None]:
        """Keys the masks of one micro-batch; around its forward pass and around its backward pass (recompute).

        Args:
            step: The optimizer step. The same sample in the same step gets the same masks wherever, and in
                whatever company, it is computed.
            segments: For each row of the batch its samples in a row: (tokens, sample index). What is left of
                a row is padding.
        """
        if not self._is_needed:
            yield
            return
        self._step, self._segments = step, segments
        self._token_keys, self._calls = {}, []
        try:
            with replaced(functional, "dropout", self._dropout):
                yield
        finally:
            self._calls = []

    def _dropout(
        self,
        x: Any,
        p: float = 0.5,
        axis: Any = None,
        training: bool = True,
        mode: str = "upscale_in_train",
        **options: Any,
    ) -> Any:
        """Stands in for `paddle.nn.functional.dropout`, whose parameters these are."""
        if not training or p == 0 or axis is not None or mode != "upscale_in_train":
            return self._original(x, p=p, axis=axis, training=training, mode=mode, **options)
        layer, number = self._calls[-1] if self._calls else ("", 0)
        if self._calls:
            self._calls[-1][1] += 1
        rows, columns = self._keys(layer, number, x.shape)
        kept = keep_mask(rows, columns, p, on_host=x.place.is_cpu_place()).reshape(x.shape)
        return _Masked.apply(x, kept, 1.0 / (1.0 - p))

    def _keys(self, layer: str, number: int, shape: list[int]) -> tuple[NDArray[Any], NDArray[Any]]:
        """uint32 keys of a tensor's rows [groups, rows] and of what is within a row [groups or 1, columns]."""
        layer_key = np.uint64(derive_seed(self.seed, "dropout", layer, number))
        batch_size = len(self._segments)
        if len(shape) == 4 or layer.rpartition(".")[2] == "attention_dropout":
            *leading, length, num_keys = shape
            tokens, positions = self._tokens_of(layer, shape, batch_size * length)
            # Heads may be folded into the batch.
            return self._attention_keys(
                layer_key, tokens, positions, num_heads=math.prod(leading) // batch_size, num_keys=num_keys
            )
        tokens = self._row_tokens(layer, shape)
        first = self.tensor_rank * shape[-1] if layer in self._split_inputs else 0
        rows = (_mix(tokens ^ _mix(layer_key)) >> np.uint64(32)).astype(np.uint32)
        return rows[None], _column_keys(first + np.arange(shape[-1]))[None]

    def _row_tokens(self, layer: str, shape: list[int]) -> NDArray[Any]:
        """Keys of the tokens that the rows of a tensor belong to, uint64 [rows]."""
        num_rows = math.prod(shape[:-1])
        router = next((each for start, each in self._routers.items() if layer.startswith(start)), None)
        if router is not None and router.passed_tokens is not None:
            numbers, num_tokens = router.passed_tokens
            tokens: NDArray[Any] = self._tokens_of(layer, shape, num_tokens)[0].ravel()[numbers.numpy()]
            return tokens
        # Under sequence parallelism, hidden states are divided among tensor ranks by tokens, or by channels; routers
        # put the tokens together before.
        is_part = len(shape) == 2 and layer not in self._split_inputs and router is None
        tokens, _ = self._tokens_of(layer, shape, num_rows * (self.tensor_degree if is_part else 1))
        tokens = (tokens.T if self.length_first else tokens).ravel()
        return tokens[self.tensor_rank * num_rows :][:num_rows] if is_part else tokens

    def _attention_keys(
        self, layer_key: Any, tokens: NDArray[Any], positions: NDArray[Any], *, num_heads: int, num_keys: int
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys of probabilities [batch, heads, length, keys]; a past in front counts back from -1."""
        heads = np.arange(num_heads, dtype=np.uint64) + np.uint64(self.tensor_rank * num_heads)
        by_head = _mix(layer_key + (heads + np.uint64(1)) * np.uint64(_GOLDEN_64))
        rows = _mix(tokens[:, None, :] ^ by_head[None, :, None]) >> np.uint64(32)
        past = np.tile(np.arange(positions.shape[1] - num_keys, 0), (len(positions), 1))
        columns = _column_keys(np.concatenate([past, positions], axis=1))
        return rows.astype(np.uint32).reshape([len(rows), -1]), columns

    def _tokens_of(self, layer: str, shape: list[int], num_tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys and positions [batch, length] of a batch's tokens, padding included."""
        length, rest = divmod(num_tokens, len(self._segments))
        longest = max(sum(size for size, _ in samples) for samples in self._segments)
        if rest or length < longest:
            raise RuntimeError(
                f"dropout in layer {layer!r} got a tensor of shape {list(shape)}, which does not belong to a batch "
                f"of {len(self._segments)} rows of up to {longest} tokens"
            )
        if length not in self._token_keys:
            self._token_keys[length] = _token_keys(self.seed, self._step, self._segments, length)
        return self._token_keys[length]


def has_dropout(model: Any) -> bool:
    """Whether anything in a model drops in training: a `Dropout` layer or a probability of its config."""
    from paddle import nn

    if any(isinstance(layer, nn.Dropout) and layer.p for layer in model.sublayers(include_self=True)):
        return True
    config = getattr(model, "config", None)
    values = config.to_dict() if config is not None else {}
    return any("dropout" in name and isinstance(value, float) and value > 0 for name, value in values.items())


def keep_mask(rows: NDArray[Any], columns: NDArray[Any], p: float, *, on_host: bool) -> Any:
    """Which elements stay, as a bool tensor [groups, rows, columns].

    Args:
        rows: uint32 [groups, rows], hashes.
        columns: uint32 [groups or 1, columns], different within a group.
        p: Probability of being dropped.
        on_host: Hash with NumPy, whose integer arithmetic is several times faster than Paddle's on CPU;
            otherwise with Paddle's operations, on the current device. Both give the same mask.
    """
    threshold = min(round(p * 2**32), 2**32 - 1) - 2**31
    if on_host:
        return paddle.to_tensor(_keep_on_host(rows, columns, threshold), place=paddle.CPUPlace())

    def constant(value: int) -> Any:
        return paddle.to_tensor(np.array([value], np.uint32).view(np.int32))

    # Paddle multiplies int32 modulo 2^32, as the hash wants; it has no uint32.
    first, second = (paddle.to_tensor(part.view(np.int32)) for part in (rows, columns))
    bits = first.unsqueeze(2) ^ second.unsqueeze(1)
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=True):
        bits = (bits ^ paddle.bitwise_right_shift(bits, constant(shift), False)) * constant(factor)
    return bits >= paddle.full([1], threshold, dtype="int32")


def _keep_on_host(rows: NDArray[Any], columns: NDArray[Any], threshold: int) -> NDArray[Any]:
    kept = np.empty((*rows.shape, columns.shape[1]), bool)
    step = max(1, _BLOCK // columns.shape[1])
    for group, row_keys in enumerate(rows):
        column_keys = columns[group % len(columns)]
        for begin in range(0, len(row_keys), step):
            bits = row_keys[begin : begin + step, None] ^ column_keys
            for shift, factor in zip(_SHIFTS, _FACTORS, strict=True):
                bits ^= bits >> np.uint32(shift)
                bits *= np.uint32(factor)
            np.greater_equal(bits.view(np.int32), threshold, out=kept[group, begin : begin + step])
    return kept


class _Masked(PyLayer):
    """x where it is kept, times a scale; only the mask, one byte an element, waits for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any, kept: Any, scale: float) -> Any:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return x * (kept.astype(x.dtype) * scale)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (kept,) = ctx.saved_tensor()
        return grad * (kept.astype(grad.dtype) * ctx.scale)


def _token_keys(seed: int, step: int, segments: Segments, length: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Key (uint64) and position within its sample (int64) of every token, each [batch, length]."""
    keys = np.zeros((len(segments), length), np.uint64)
    positions = np.zeros((len(segments), length), np.int64)
    for row, samples in enumerate(segments):
        begin = 0
        for num_tokens, index in samples:
            place = slice(begin, begin + num_tokens)
            sample_key = _mix(np.uint64(derive_seed(seed, "dropout", step, index)))
            steps = np.arange(num_tokens, dtype=np.uint64)
            keys[row, place] = _mix(sample_key + steps * np.uint64(_GOLDEN_64))
            positions[row, place] = steps
            begin += num_tokens
    return keys, positions


def _column_keys(numbers: NDArray[Any]) -> NDArray[Any]:
    """Numbers (int64, below 2^31 in size) -> uint32 keys, different for different numbers."""
    return (numbers.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32) * np.uint32(_GOLDEN_32)


def _mix(keys: Any) -> Any:
    """SplitMix64's finalizer on uint64 of any shape: a bijection that spreads every bit over all."""
    with np.errstate(over="ignore"):
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return keys ^ (keys >> np.uint64(31))
