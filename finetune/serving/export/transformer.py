"""The layers of any described decoder, as operations that a static graph runs quickly on CPU.

Shapes: B rows, S new tokens, T tokens of the cache, K kv heads, G groups of query heads (heads / K), D the
size of a head. Keys and values are kept as [1, K, B, T, D] per layer, so that cos and sin [B, S, D] and the
mask [B, S, T] are multiplied and added over leading axes, the one form of broadcasting that Paddle's CPU
kernels are quick at.

In half precision the same is float32 as in training: norms with their weights, the turn of rotary positions, scores,
masks with distances, softmax, and the logits that are handed out. What comes out of a norm, a turn or a softmax is
rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from numpy.typing import NDArray
from paddle import _C_ops, nn

from finetune.families.attention import soft_capped
from finetune.families.decoder_description import DecoderDescription, Linear, Norm
from finetune.serving.export.expert_layer import ExpertLayer
from finetune.serving.export.layout import fold_norm, pack_layer, rms_gain
from finetune.serving.export.linear_layer import ACTIVATIONS, LinearLayer, activate_gated, parameter
from finetune.serving.export.packed_layers import GraphMatrix, PackedLinearLayer

KeyValue = tuple[paddle.Tensor, paddle.Tensor]
Store = Callable[[KeyValue, KeyValue], KeyValue]


def unit_rms(x: Any, size: int, epsilon: float) -> Any:
    """Float32 x / sqrt(sum(x^2) + size * epsilon) of x [..., size]."""
    if x.dtype == paddle.float32:
        return _C_ops.norm(x, x.ndim - 1, size * epsilon, True)[0]
    wide = x.astype("float32")
    squares = wide.square().sum(-1, keepdim=True)
    return wide * paddle.rsqrt(squares + size * epsilon)


class NormLayer(nn.Layer):
    """Layer norm, or an RMS norm whose weight stands in the matrix behind it (`layout.fold_norm`).

    Args:
        norm: As described.
        dtype: Of the weights of a layer norm; those of an RMS norm are float32.
        keep_gain: Multiply with the weight of an RMS norm here, where nothing behind it can take it.
    """

    def __init__(self, norm: Norm, dtype: str, *, keep_gain: bool = False):
        super().__init__()
        self.size, self.epsilon = len(norm.weight), norm.epsilon
        self.is_rms = norm.bias is None
        self.weight = self.bias = None
        if norm.bias is not None:
            self.weight, self.bias = parameter(norm.weight, dtype), parameter(norm.bias, dtype)
        elif keep_gain or dtype != "float32":
            self.weight = parameter(rms_gain(norm), "float32")

    def forward(self, x: Any) -> Any:
        """[B, S, hidden] -> the same shape."""
        if not self.is_rms:
            return F.layer_norm(x, [self.size], self.weight, self.bias, self.epsilon)
        normed = unit_rms(x, self.size, self.epsilon)
        return _rounded(normed if self.weight is None else normed * self.weight, x.dtype)


class DecoderLayer(nn.Layer):
    """Attention and feed-forward layers of one depth."""

    def __init__(
        self,
        description: DecoderDescription,
        number: int,
        dtype: str,
        matrices: Mapping[str, GraphMatrix] | None = None,
    ):
        super().__init__()
        self.shape, self.has_window = description.shape, description.shape.has_window(number)
        # Factors are not taken into matrices that are rounded, or packed.
        self.is_unfolded = dtype != "float32" or matrices is not None
        packed = pack_layer(description.layer(number), self.shape, fold=not self.is_unfolded)
        self.groups = self.shape.num_heads // self.shape.num_kv_heads

        def linear(role: str) -> nn.Layer:
            whole: Linear = getattr(packed, role)
            return PackedLinearLayer(matrices[role], whole.bias) if matrices else LinearLayer(whole, dtype)

        self.attention_norm = NormLayer(packed.attention_norm, dtype, keep_gain=self.is_unfolded)
        self.qkv, self.output = linear("qkv"), linear("output")
        # The weight of the norm before experts stays its own, instead of going into a matrix of each.
        keep_gain = self.is_unfolded or packed.experts is not None
        self.inner_norm = NormLayer(packed.inner_norm, dtype, keep_gain=keep_gain)
        if packed.experts is None:
            self.inner, self.outer = linear("inner"), linear("outer")
            self.experts = None
        else:
            self.experts = ExpertLayer(packed.experts, dtype, self._activate)
        self.attention_output_norm = _optional(packed.attention_output_norm, dtype)
        self.inner_output_norm = _optional(packed.inner_output_norm, dtype)
        self.heads_gain = None if packed.heads_norm is None else parameter(packed.heads_norm, "float32")
        self.heads_epsilon = packed.heads_epsilon

    def forward(self, x: Any, turn: Any, mask: Any, past: KeyValue, store: Store) -> tuple[Any, KeyValue]:
        """Hidden states [B, S, hidden] and the cache with the new tokens.

        Args:
            x: [B, S, hidden].
            turn: cos, sin [B, S, D] and the half turn [D, D], float32; None without rotary positions.
            mask: Added to the scores [G, K, B, S, T], float32.
            past: Keys and values so far.
            store: (past, new) -> all keys and values.
        """
        normed = self.attention_norm(x) if self.shape.norm_first else x
        attended, cache = self._attend(normed, turn, mask, past, store)
        attended = self._branch(self.attention_output_norm, attended)
        if self.shape.parallel_branches:
            return x + (attended + self._inner_branch(self.inner_norm(x))), cache
        x = self._kept(x, normed) + attended
        if not self.shape.norm_first:
            x = self.attention_norm(x)
        normed = self.inner_norm(x) if self.shape.norm_first else x
        x = self._kept(x, normed) + self._inner_branch(normed)
        return (x if self.shape.norm_first else self.inner_norm(x)), cache

    def _kept(self, x: Any, normed: Any) -> Any:
        """What a branch is added to."""
        if not self.shape.residual_from_norm:
            return x
        return normed if self.shape.residual_factor == 1.0 else normed * self.shape.residual_factor

    def _attend(self, x: Any, turn: Any, mask: Any, past: KeyValue, store: Store) -> tuple[Any, KeyValue]:
        shape, groups = self.shape, self.groups
        heads = self.qkv(x).reshape([0, 0, groups + 2, shape.num_kv_heads, shape.head_dim])
        heads = heads.transpose([2, 3, 0, 1, 4])  # [G + 2, K, B, S, D]
        query_key, value = paddle.split(heads, [groups + 1, 1], axis=0)
        if self.heads_gain is not None:
            unit = unit_rms(query_key, shape.head_dim, self.heads_epsilon)
            query_key = _rounded(unit * self.heads_gain, query_key.dtype)
        if turn is not None:
            query_key = _turned(query_key, *turn)
        query, key = paddle.split(query_key, [groups, 1], axis=0)
        keys, values = store(past, (key, value))
        scores = paddle.matmul(query, keys, transpose_y=True)
        if self.is_unfolded:
            scores = scores.astype("float32") * shape.score_factor
        weights = F.softmax(soft_capped(scores, shape.score_cap) + mask, axis=-1)
        weights = _rounded(weights, values.dtype)
        attended = paddle.matmul(weights, values).transpose([2, 3, 0, 1, 4])
        return self.output(attended.reshape([0, 0, shape.num_heads * shape.head_dim])), (keys, values)

    def _inner_branch(self, normed: Any) -> Any:
        return self._branch(self.inner_output_norm, self._feed_forward(normed))

    def _branch(self, norm: NormLayer | None, output: Any) -> Any:
        """What a branch gives, as it is added."""
        branch = output if norm is None else norm(output)
        return branch if self.shape.branch_scale == 1.0 else branch * self.shape.branch_scale

    def _feed_forward(self, x: Any) -> Any:
        if self.experts is not None:
            return self.experts(x)
        return self.outer(self._activate(self.inner(x)))

    def _activate(self, x: Any) -> Any:
        """What stands between the inner and the outer layer; of a gated one [..., 2 x inner] -> [..., inner]."""
        activation = self.shape.activation
        return activate_gated(x, activation) if self.shape.gated else ACTIVATIONS[activation](x)


class Decoder(nn.Layer):
    """Token ids to logits, with a cache that the caller stores.

    Args:
        description: What to compute.
        dtype: Of weights and cache.
        matrices: Role -> packed matrix of every layer; None: as described.
    """

    def __init__(
        self,
        description: DecoderDescription,
        dtype: str,
        matrices: Sequence[Mapping[str, GraphMatrix]] | None = None,
    ):
        super().__init__()
        self.shape, self.dtype = description.shape, dtype
        norm = description.final_norm
        keep_gain = description.head is None or dtype != "float32"
        self.embedding = parameter(description.embedding, dtype)
        self.embedding_norm = _optional(description.embedding_norm, dtype)
        self.positions = _optional(description.positions, dtype)
        self.project_in = _optional(description.project_in, dtype)
        self.layers = nn.LayerList(
            [
                DecoderLayer(description, number, dtype, matrices[number] if matrices else None)
                for number in range(self.shape.num_layers)
            ]
        )
        self.final_norm = None if norm is None else NormLayer(norm, dtype, keep_gain=keep_gain)
        self.project_out = _optional(description.project_out, dtype)
        self.head = None
        if description.head is not None:
            head = Linear(description.head)
            self.head = LinearLayer(head if norm is None or keep_gain else fold_norm(norm, head), dtype)
        self.frequencies = _optional(description.rotary_frequencies, "float32")
        self.local_frequencies = _optional(description.local_frequencies, "float32")
        self.amplitudes = _optional(_amplitudes(description), "float32")
        self.slopes = _optional(description.distance_slopes, "float32")
        self.rounded_divisor = description.rounded_divisor
        self.half_turn = None
        if self.frequencies is not None:
            self.half_turn = parameter(_half_turn(self.shape.head_dim), "float32")

    def forward(
        self, ids: Any, positions: Any, masks: Mapping[bool, Any], pasts: list[KeyValue], store: Store
    ) -> tuple[Any, list[KeyValue]]:
        """Logits [B, 1, vocabulary] of the last token, float32, and the cache of every layer.

        Args:
            ids: [B, S].
            positions: [B, S], the first token of a text at 0; [B, S, 2] where a token has two.
            masks: Of layers without (False) and with (True) a window; see `DecoderLayer.forward`.
            pasts: Keys and values so far, per layer.
            store: (past, new) -> all keys and values of a layer.
        """
        x = self._embed(ids, positions)
        turn = local = self._turn(positions, self.frequencies, self.amplitudes)
        if self.local_frequencies is not None:
            local = self._turn(positions, self.local_frequencies)
        caches = []
        for number, layer in enumerate(self.layers):
            narrow = layer.has_window
            own = (local if narrow else turn) if self.shape.has_turn(number) else None
            x, cache = layer(x, own, masks[narrow], pasts[number], store)
            caches.append(cache)
        return self._logits(x[:, -1:]), caches

    def _embed(self, ids: Any, positions: Any) -> Any:
        x = F.embedding(ids, self.embedding)
        if self.shape.embedding_scale != 1.0:
            x = x * self.shape.embedding_scale
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.project_in is not None:
            x = self.project_in(x)
        return x if self.positions is None else x + F.embedding(positions, self.positions)

    def _turn(self, positions: Any, frequencies: Any, amplitudes: Any = None) -> Any:
        if frequencies is None:
            return None
        places = positions.astype("float32").unsqueeze(-1)
        if self.shape.context_marks is None:
            angles = places * frequencies  # [B, S, D / 2]
        else:  # [B, S, 2, D / 4], one half of the pairs by each position
            angles = (places * frequencies.reshape([2, -1])).flatten(2)
        angles = paddle.concat([angles, angles], axis=-1)
        cos, sin = paddle.cos(angles), paddle.sin(angles)
        if amplitudes is not None:
            cos, sin = cos * amplitudes, sin * amplitudes
        return cos, sin, self.half_turn

    def _logits(self, x: Any) -> Any:
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        logits = paddle.matmul(x, self.embedding, transpose_y=True) if self.head is None else self.head(x)
        divisor = self.shape.logit_divisor
        logits = soft_capped(logits.astype("float32"), self.shape.logit_cap)
        return logits if divisor == 1.0 else logits / divisor


def _amplitudes(description: DecoderDescription) -> NDArray[Any] | None:
    """What cos and sin of each place are multiplied with, [D]; None for nothing. Places that do not turn stay."""
    frequencies, amplitude = description.rotary_frequencies, description.rotary_amplitude
    if frequencies is None or amplitude == 1.0:
        return None
    return np.tile(np.where(frequencies == 0, np.float32(1.0), np.float32(amplitude)), 2)


def _turned(heads: Any, cos: Any, sin: Any, half_turn: Any) -> Any:
    """Rotary positions on heads [..., D], in float32 and rounded to their type."""
    wide = _rounded(heads, paddle.float32)
    return _rounded(wide * cos + paddle.matmul(wide, half_turn) * sin, heads.dtype)


def _rounded(tensor: Any, dtype: Any) -> Any:
    """The tensor in a type; a cast that changes nothing would still be a step of the graph."""
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)


def _optional(part: Norm | Linear | NDArray[Any] | None, dtype: str) -> Any:
    """The layer or parameter of a part that not every decoder has."""
    if part is None:
        return None
    if isinstance(part, Norm):
        return NormLayer(part, dtype, keep_gain=True)
    return LinearLayer(part, dtype) if isinstance(part, Linear) else parameter(part, dtype)


def _half_turn(dim: int) -> NDArray[Any]:
    """The matrix R with x @ R = concat(-x[dim/2:], x[:dim/2])."""
    matrix = np.zeros((dim, dim), np.float32)
    places = np.arange(dim // 2)
    matrix[places, places + dim // 2] = 1.0
    matrix[places + dim // 2, places] = -1.0
    return matrix
