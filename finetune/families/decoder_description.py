"""What a decoder computes, in one form for all families: the input of the static-graph export.

A description names weights by their role, so that whoever builds a graph from it knows no family. Every
family has a module `decoder` in its folder with `describe(model) -> DecoderDescription`.
Weights are read layer by layer, when asked for, because all of them in float32 may be more than the
machine holds beside the model.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.families.context_marks import ContextMarks
from finetune.families.family import Family


@dataclass(frozen=True)
class Norm:
    """A norm over the hidden size: layer norm, or RMS norm where there is no bias.

    Attributes:
        weight: [hidden].
        epsilon: Added to the variance (RMS norm: to the mean square).
        bias: [hidden] or None.
    """

    weight: NDArray[Any]
    epsilon: float
    bias: NDArray[Any] | None = None


@dataclass(frozen=True)
class Linear:
    """x @ weight + bias.

    Attributes:
        weight: [in, out].
        bias: [out] or None.
    """

    weight: NDArray[Any]
    bias: NDArray[Any] | None = None


@dataclass(frozen=True)
class SharedExpert:
    """The expert that every token passes beside those that are chosen for it.

    Attributes:
        gate: From hidden to 1; its sigmoid multiplies what the expert gives.
        inner: To twice the inner size, the gate's half first.
        outer: From the inner size to hidden.
    """

    gate: Linear
    inner: Linear
    outer: Linear


@dataclass(frozen=True)
class ExpertWeights:
    """Feed-forward layers of which each token passes a few.

    Attributes:
        router: From hidden to the number of experts.
        inner: Of all experts, [experts, hidden, 2 x inner size], the gate's half first.
        outer: Of all experts, [experts, inner size, hidden].
        num_chosen: Experts that a token passes.
        normalised: Whether the shares of a token's experts are divided by their sum.
        shared: The expert of all tokens; None where there is none.
    """

    router: Linear
    inner: NDArray[Any]
    outer: NDArray[Any]
    num_chosen: int
    normalised: bool
    shared: SharedExpert | None = None


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer.

    Attributes:
        attention_norm: Norm of the attention.
        query: To heads x head dim; query head i reads key and value head i // (heads / kv heads).
        key: To kv heads x head dim.
        value: Like `key`.
        output: From heads x head dim to hidden.
        inner_norm: Norm of the feed-forward layers; that of attention again where both share one.
        inner: To the inner size; with a gate to twice that, the gate's half first. None where there are experts.
        outer: From the inner size to hidden; None where there are experts.
        attention_output_norm: Norm of what attention gives, before it is added; None where there is none.
        inner_output_norm: The same of what the feed-forward layers give.
        query_norm: RMS norm of every query head before it is turned, [head dim]; None where there is none.
        key_norm: The same of key heads; there is one where there is one of queries.
        experts: In the place of `inner` and `outer`.
    """

    attention_norm: Norm
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    inner_norm: Norm
    inner: Linear | None
    outer: Linear | None
    attention_output_norm: Norm | None = None
    inner_output_norm: Norm | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    experts: ExpertWeights | None = None


@dataclass(frozen=True)
class DecoderShape:
    """Sizes and variants of a decoder.

    Attributes:
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated: Whether the activation of one half of the inner layer multiplies the other half.
        norm_first: Whether norms stand before attention and feed-forward layers, or behind the sums.
        residual_from_norm: Whether the sums add to the norm's result instead of to its input.
        residual_factor: What that result is multiplied with.
        parallel_branches: Whether the feed-forward layers get what attention gets, and both are added at once; norms
            stand before them.
        branch_scale: Factor on what each branch gives before it is added.
        embedding_scale: Factor on word embeddings.
        max_positions: Most tokens of a text; None without a limit.
        window: A token sees this many tokens, itself included; None: all before it.
        windowed_layers: For each layer whether it has the window; None: all have.
        turned_layers: For each layer whether rotary positions turn its heads; None: they do in all.
        score_scale: Factor on the scores; None: 1 / sqrt(head dim).
        score_cap: Scores s become cap * tanh(s / cap); None: they stay.
        logit_cap: The same of the logits.
        logit_divisor: What the logits are divided by.
        head_order: Where each place of a head is found in the model's own head, for queries and keys:
            rotary positions turn place i together with place i + head dim / 2.
        context_marks: Tokens that end a context which every token of its text sees. Rotary positions then turn the
            first half of a head's pairs by the position in the context, the others by that in the answer; see
            `finetune.families.two_positions`. None: a token sees what lies before it.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    gated: bool
    norm_first: bool = True
    residual_from_norm: bool = False
    residual_factor: float = 1.0
    parallel_branches: bool = False
    branch_scale: float = 1.0
    embedding_scale: float = 1.0
    max_positions: int | None = None
    window: int | None = None
    windowed_layers: tuple[bool, ...] | None = None
    turned_layers: tuple[bool, ...] | None = None
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    logit_divisor: float = 1.0
    head_order: NDArray[Any] | None = None
    context_marks: ContextMarks | None = None

    @property
    def score_factor(self) -> float:
        """Factor on the scores."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    def has_turn(self, layer: int) -> bool:
        """Whether rotary positions, where there are some, turn the heads of a layer."""
        return self.turned_layers is None or self.turned_layers[layer]

    def has_window(self, layer: int) -> bool:
        """Whether a layer sees the last tokens only."""
        return bool(self.window) and (self.windowed_layers is None or self.windowed_layers[layer])


@dataclass(frozen=True)
class DecoderDescription:
    """A decoder with its weights, all float32 arrays.

    Attributes:
        shape: Sizes and variants.
        embedding: [vocabulary, embedding].
        layer: Number of a layer -> its weights.
        final_norm: Norm before the output layer, None where there is none.
        head: Output layer [hidden, vocabulary]; None: the transposed embedding.
        embedding_norm: Norm of the word embeddings.
        rotary_frequencies: Radians per position of each pair of a head's places, [head dim / 2]; 0 for
            places that do not turn. None: no rotary positions (Su et al. 2021).
        rotary_amplitude: What cos and sin of places that turn are multiplied with.
        local_frequencies: The same in layers with a window, with amplitude 1; None: those of all layers.
        distance_slopes: What a key's position adds to the scores of each head, [heads] (ALiBi, Press et
            al. 2022). None: nothing.
        rounded_divisor: Of slopes times positions, rounded to bfloat16; None: exact products.
        positions: Table of learned positions [positions, hidden], the first text position first.
        project_in: From narrow word embeddings to hidden.
        project_out: From hidden back to the size of the embeddings.
    """

    shape: DecoderShape
    embedding: NDArray[Any]
    layer: Callable[[int], LayerWeights]
    final_norm: Norm | None
    head: NDArray[Any] | None
    embedding_norm: Norm | None = None
    rotary_frequencies: NDArray[Any] | None = None
    rotary_amplitude: float = 1.0
    local_frequencies: NDArray[Any] | None = None
    distance_slopes: NDArray[Any] | None = None
    rounded_divisor: float | None = None
    positions: NDArray[Any] | None = None
    project_in: Linear | None = None
    project_out: Linear | None = None


def describe(model: Any, family: Family) -> DecoderDescription:
    """The description of a loaded model; see `check_description`.

    Args:
        model: A PaddleNLP causal language model, adapters merged.
        family: Its record.
    """
    check_description(family)
    description: DecoderDescription = importlib.import_module(_module(family)).describe(model)
    return description


def check_description(family: Family) -> None:
    """Looks whether models of a family can be described, before their weights are read.

    Raises:
        UserError: The family has no description.
    """
    package = f"{__package__}.{family.name}"
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(_module(family)) is None:
        raise UserError(
            f"family {family.name} cannot be exported to a static graph yet: generate with the model as it is"
        )


def _module(family: Family) -> str:
    return f"{__package__}.{family.name}.decoder"


def array(tensor: Any) -> NDArray[Any]:
    """A parameter as float32."""
    values: NDArray[Any] = tensor.astype("float32").numpy()
    return values


def linear(layer: Any, columns: slice | NDArray[Any] = slice(None)) -> Linear:
    """A linear layer of PaddleNLP's, or some of its outputs."""
    bias = getattr(layer, "bias", None)
    return Linear(array(layer.weight)[:, columns], None if bias is None else array(bias)[columns])


def joined(first: Linear, second: Linear) -> Linear:
    """Two linear layers of one input as one; the outputs of the first come first."""
    weight = np.concatenate([first.weight, second.weight], axis=1)
    if first.bias is None or second.bias is None:
        return Linear(weight)
    return Linear(weight, np.concatenate([first.bias, second.bias]))


def layer_norm(layer: Any) -> Norm:
    """A layer norm of Paddle's."""
    return Norm(array(layer.weight), float(layer._epsilon), array(layer.bias))
