"""Which keys a query sees, and the kernel that is told so in one way only.

What a layer gets under the name of an attention mask is one of four things:

| form | meaning |
|---|---|
| None | causal: a token sees itself and all before it (one new token behind a cache: everything) |
| int32 [batch, 1, keys] | rows of packed samples: causal, and key j is seen by queries before row `[.., j]` |
| bool [batch, 1, queries, keys] | true for what is seen, causality included |
| float [batch, 1 or heads, queries, keys] | added to the scores: a mask, or distances and a mask together |

PaddleNLP hands Paddle's `scaled_dot_product_attention` a dense mask and `is_causal=True` together, or finds out by a
read from the device whether a mask is merely causal. Of the two Paddle documents that the mask is then ignored: packed
samples see each other. Here a kernel gets a mask or `is_causal`, never both, and nothing is read back.

Scores are added and normalised in float32 whatever the weights are: the fused kernels do so inside, `plain_attention`
by its own casts. The queries and keys of a product, the probabilities and the values are in the type of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
import paddle.nn.functional as F

HALF_TYPES = (paddle.float16, paddle.bfloat16)


def are_packed_rows(visible: Any) -> bool:
    """Whether what a layer got as its mask is the end row of every key (see the module's text)."""
    return visible is not None and visible.dtype == paddle.int32 and visible.ndim == 3


def visible_keys(attention_mask: Any, shape: tuple[int, int], past_length: int = 0) -> Any:
    """What the layers of a model with fused attention are given, from what the model is given.

    Args:
        attention_mask: None; [batch, keys] with 1 for tokens; [batch, queries, keys] or [batch, 1, queries, keys],
            true for what is seen and causal by itself; or end rows, int32 [batch, 1, keys].
        shape: Batch size and number of queries.
        past_length: Keys in front of the queries' own: a cache or a prefix.

    Returns:
        None, end rows, or a bool mask [batch, 1, queries, keys].

    Raises:
        ValueError: End rows with a past in front, whose rows would have to be counted anew.
    """
    if are_packed_rows(attention_mask):
        if past_length:
            raise ValueError("rows of packed samples with past keys and values: give a block mask")
        return attention_mask
    if attention_mask is None:
        single = shape[1] == 1
        return None if single or not past_length else dense_mask(None, shape, past_length)
    return dense_mask(attention_mask, shape, past_length)


def dense_mask(attention_mask: Any, shape: tuple[int, int], past_length: int = 0) -> Any:
    """The bool mask [batch, 1, queries, keys] of any form but float; see `visible_keys`.

    A query always sees its own token, so that padding on the left has no row without any key: its result is read by
    nobody, but would be NaN where a kernel divides by the sum of nothing.
    """
    batch_size, num_queries = shape
    if attention_mask is not None and attention_mask.ndim > 2 and not are_packed_rows(attention_mask):
        given = attention_mask.astype("bool")
        return given.unsqueeze(1) if given.ndim == 3 else given
    num_keys = past_length + num_queries
    places = paddle.arange(past_length, num_keys).unsqueeze(1)  # [queries, 1], the column of each query
    columns = paddle.arange(num_keys).unsqueeze(0)
    visible = (columns <= places).reshape([1, 1, num_queries, num_keys])
    if are_packed_rows(attention_mask):
        return visible & (places < attention_mask.astype(places.dtype).unsqueeze(2))
    if attention_mask is not None:
        visible = visible & attention_mask.astype("bool").unsqueeze([1, 2])
        visible = visible | (columns == places)
    return visible.expand([batch_size, 1, num_queries, num_keys])


def causal_mask(attention_mask: Any, shape: tuple[int, int], past_length: int = 0) -> Any:
    """`dense_mask`, and causal even where a mask [.., queries, keys] was given that is not so by itself."""
    visible = dense_mask(attention_mask, shape, past_length)
    if attention_mask is not None and attention_mask.ndim > 2:
        visible = visible & dense_mask(None, shape, past_length)
    return visible


def visible_in_window(
    given: Any,
    shape: tuple[int, int],
    past_length: int = 0,
    *,
    places: Any,
    window: int | None,
    fused: bool,
) -> Any:
    """What the layers of a model with a sliding window are given.

    Args:
        given: See `visible_keys`.
        shape: Batch size and number of queries.
        past_length: Keys in front of the queries' own.
        places: int [batch, queries], each query's place in its own text, behind what is past.
        window: A token sees this many tokens, itself included; None: all before it.
        fused: Whether attention runs on a fused kernel.

    Returns:
        As `visible_keys`; without the kernel a mask to add to float32 scores, one for all layers.
    """
    num_keys = past_length + shape[1]
    window = window or num_keys
    is_narrow = window < num_keys
    if not fused:
        refuse_packed_rows(given)
    if are_packed_rows(given):
        rows = visible_keys(given, shape, past_length)
        return (
            paddle.minimum(rows, paddle.arange(window, window + num_keys, dtype="int32"))
            if is_narrow
            else rows
        )
    if fused and not is_narrow:
        return visible_keys(given, shape, past_length)
    visible = causal_mask(given, shape, past_length)
    if is_narrow:
        visible = visible & _is_near(given, places, past_length, window)
    return visible if fused else additive(visible, paddle.float32)


def _is_near(given: Any, places: Any, past_length: int, window: int) -> Any:
    """Which keys lie in the window of each query, bool [batch or 1, 1, queries, keys].

    In a row of several texts distances are those within a text: two answers that share a prompt both follow it at
    once, and each text of a packed row stands as near to a prefix as it would alone.
    """
    if given is None or given.ndim == 2 or are_packed_rows(given):
        keys = paddle.arange(past_length + places.shape[1]).unsqueeze(0)  # [1, keys]
        queries = keys[:, past_length:]
    else:
        queries = places.astype("int64")
        past = paddle.arange(past_length).expand([places.shape[0], past_length])  # [batch, past]
        keys = paddle.concat([past, queries], axis=1)  # [batch, keys]
    return (keys.unsqueeze(1) > queries.unsqueeze(2) - window).unsqueeze(1)


def refuse_packed_rows(attention_mask: Any) -> None:
    """Raises ValueError for end rows, which layers without the fused kernel do not read."""
    if are_packed_rows(attention_mask):
        raise ValueError("rows of packed samples without use_flash_attention: give a block mask")


def distance_bias(
    slopes: Any, key_positions: Any, visible: Any, *, rounded_divisor: float | None = None
) -> Any:
    """ALiBi and a mask as one tensor to add to the scores, float32 [batch, heads, queries, keys].

    The distance is that of key and query, 0 on the diagonal, not the position of the key. Softmax sees no difference,
    but a kernel that takes its bias in half precision does: bfloat16 has 8 bits, so that positions 257 and 258 are
    one, while a distance d is off by d / 256 at most, where its probability has fallen by exp(slope x d).

    Args:
        slopes: float32 [heads], Press et al., "Train Short, Test Long" (2022).
        key_positions: int [batch, keys].
        visible: bool [batch, 1, queries, keys].
        rounded_divisor: Of what `rounded_products` gives for keys, where a family was trained with it; None: exact
            products.
    """
    first = key_positions.shape[1] - visible.shape[2]
    with paddle.amp.auto_cast(enable=False):
        if rounded_divisor is None:
            query_positions = key_positions[:, first:]
            distances = (key_positions.unsqueeze(1) - query_positions.unsqueeze(2)).astype("float32")
            bias = slopes.reshape([1, -1, 1, 1]) * distances.unsqueeze(1)  # [batch, heads, queries, keys]
        else:
            products = rounded_products(slopes.reshape([1, -1, 1]), key_positions.unsqueeze(1))
            # [batch, heads, queries, keys]; the difference of two such numbers is exact.
            bias = (products.unsqueeze(2) - products[:, :, first:].unsqueeze(3)) / rounded_divisor
        return paddle.where(visible, bias, paddle.finfo(paddle.float32).min)


def rounded_products(slopes: Any, positions: Any) -> Any:
    """Slopes times positions with both factors and the product rounded to bfloat16, float32: Falcon's published code."""
    return _rounded(_rounded(slopes) * _rounded(positions))


def _rounded(values: Any) -> Any:
    """To bfloat16 and back to float32."""
    return values.astype("float32").astype("bfloat16").astype("float32")


def distances_and_mask(
    slopes: Any,
    given: Any,
    shape: tuple[int, int],
    past_length: int,
    *,
    position_ids: Any,
    rounded_divisor: float | None = None,
) -> Any:
    """`distance_bias` of what was given, with distances within each text of a row, float32 [batch, heads, length, keys].

    Args:
        slopes: float32 [heads].
        given: [batch, past + length] with 1 for tokens, or [batch, 1, length, past + length], true for what may be
            seen. None: all tokens.
        shape: Rows of the batch and tokens of each.
        past_length: Keys in front of the row.
        position_ids: [batch, length], of each text from 0 in a row of several; used with the second kind of mask.
        rounded_divisor: See `distance_bias`.

    Raises:
        ValueError: Rows of packed samples.
    """
    if are_packed_rows(given):
        raise ValueError("rows of packed samples, which no kernel takes together with distances: give a mask")
    if given is None:
        given = paddle.ones([shape[0], past_length + shape[1]], dtype="bool")  # [batch, keys]
    visible = causal_mask(given, shape, past_length)
    key_positions = _key_positions(given, position_ids, past_length)
    return distance_bias(slopes, key_positions, visible, rounded_divisor=rounded_divisor)


def _key_positions(attention_mask: Any, position_ids: Any, past_length: int) -> Any:
    """Positions [batch, keys]: tokens counted from 0, what lies in the past first."""
    if attention_mask.ndim == 2:
        tokens = attention_mask.astype("int64")
        return (tokens.cumsum(axis=-1) - 1) * tokens
    batch_size, num_keys = attention_mask.shape[0], attention_mask.shape[-1]
    if position_ids is None:
        return paddle.arange(num_keys).expand([batch_size, num_keys])
    past = paddle.arange(past_length, dtype=position_ids.dtype).expand(
        [batch_size, past_length]
    )  # [batch, past]
    return paddle.concat([past, position_ids + past_length], axis=1)


def additive(visible: Any, dtype: Any) -> Any:
    """A bool mask or a bias in the form that is added to scores of some type: finite, its minimum for the unseen."""
    lowest = paddle.finfo(dtype).min
    with paddle.amp.auto_cast(enable=False):
        if visible.dtype == paddle.bool:
            return paddle.where(visible, 0.0, lowest).astype(dtype)
        if visible.dtype == dtype:
            return visible
        return visible.clip(min=lowest).astype(dtype)


def fused_attention(query: Any, key: Any, value: Any, visible: Any = None, *, drop_rate: float = 0.0) -> Any:
    """Attention by Paddle's fused kernels; without them (CPU) by Paddle's own plain form.

    Args:
        query: [batch, queries, heads, head dim].
        key: [batch, keys, kv heads, head dim], in the type of the query; kv heads divide heads.
        value: Like `key`.
        visible: See the module's text.
        drop_rate: Share of probabilities that are dropped.

    Returns:
        [batch, queries, heads, head dim].
    """
    if are_packed_rows(visible):
        return F.flashmask_attention(
            query, key, value, startend_row_indices=visible.unsqueeze(-1), dropout=drop_rate, causal=True
        )
    mask = None if visible is None else additive(visible, query.dtype)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=drop_rate,
        is_causal=mask is None and query.shape[1] > 1,
    )


def plain_attention(
    query: Any,
    key: Any,
    value: Any,
    visible: Any = None,
    *,
    drop: Callable[[Any], Any] | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> Any:
    """Attention by products and a softmax; shapes as in `fused_attention`.

    Args:
        query: The queries.
        key: The keys.
        value: The values.
        visible: See the module's text.
        drop: Applied to the probabilities [batch, heads, queries, keys].
        scale: Factor on the scores; None: 1 / sqrt(head dim).
        cap: Scores s become cap * tanh(s / cap) before the mask; None: they stay.
    """
    num_groups = query.shape[2] // key.shape[2]
    query, key, value = (part.transpose([0, 2, 1, 3]) for part in (query, key, value))
    if num_groups > 1:
        key, value = (_repeat_heads(part, num_groups) for part in (key, value))
    # Before the product, which could exceed what float16 holds.
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = paddle.matmul(query * scale, key, transpose_y=True)  # [batch, heads, queries, keys]
    if visible is None or visible.dtype == paddle.int32:
        shape, past_length = (scores.shape[0], scores.shape[2]), scores.shape[3] - scores.shape[2]
        visible = dense_mask(visible, shape, past_length)
    with paddle.amp.auto_cast(enable=False):
        scores = soft_capped(_as_float32(scores), cap) + additive(visible, paddle.float32)
        weights = F.softmax(scores, axis=-1).astype(value.dtype)
    if drop is not None:
        weights = drop(weights)
    return paddle.matmul(weights, value).transpose([0, 2, 1, 3])


def soft_capped(values: Any, cap: float | None) -> Any:
    """Values v as cap * tanh(v / cap), between -cap and cap; without a cap as they are."""
    return values if cap is None else paddle.tanh(values / cap) * cap


def _repeat_heads(part: Any, num_groups: int) -> Any:
    """[batch, kv heads, keys, head dim] -> [batch, heads, keys, head dim]; heads of a group share one."""
    batch_size, num_heads, num_keys, head_dim = part.shape
    wide = part.unsqueeze(2).expand([batch_size, num_heads, num_groups, num_keys, head_dim])
    return wide.reshape([batch_size, num_heads * num_groups, num_keys, head_dim])


def _as_float32(tensor: Any) -> Any:
    return tensor if tensor.dtype == paddle.float32 else tensor.astype("float32")
