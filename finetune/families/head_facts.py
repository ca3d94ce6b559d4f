"""What tells one gated decoder from another, in one record; the layers are in `head_attention` and `head_decoder`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.families.expert_facts import ExpertFacts
from finetune.families.rotary_scaling import RotaryScaling, inverse_frequencies


@dataclass(frozen=True)
class NormNames:
    """The norms of a layer, as the family's files call them.

    Attributes:
        attention: Of what attention gets.
        inner: Of what the feed-forward layers get; None: that of attention, in layers with parallel branches.
        attention_output: Of what attention gives, before it is added; None where there is none.
        inner_output: The same of the feed-forward layers.
    """

    attention: str = "input_layernorm"
    inner: str | None = "post_attention_layernorm"
    attention_output: str | None = None
    inner_output: str | None = None

    @property
    def all(self) -> list[str]:
        """The names of those that there are."""
        names = (self.attention, self.inner, self.attention_output, self.inner_output)
        return [name for name in names if name]


TWO_NORMS = NormNames()


@dataclass(frozen=True)
class HeadFacts:
    """What tells one family's decoder from another's.

    Attributes:
        normed: Whether queries and keys pass an RMS norm over the head before they are turned.
        halves: Whether rotary positions pair place i with place i + turned places / 2; else with its neighbour.
        turned_share: Share of a head that rotary positions turn: its first places; 0: none.
        turned_layers: For each layer whether positions turn its heads; None: they do in all.
        learned_positions: Whether a table gives each position a row that is added to the embedding.
        distances: Whether scores get distances (ALiBi, Press et al. 2022) in place of rotary positions.
        rounded_divisor: Of distances whose products with the slopes are rounded to bfloat16; None: exact products.
        scaling: How the angles of rotary positions are stretched; None: not at all.
        local_base: Base of the angles, unscaled, in layers with a window; None: that of all layers.
        window: A token sees this many tokens, itself included; None: all before it.
        windowed_layers: For each layer whether it has the window; None: all have.
        joined_input: Whether one layer gives queries, keys and values, one behind the other.
        grouped_input: Whether that layer gives the queries of a key head, its key, its value, then the next key head's.
        gated: Whether the feed-forward layers have a gate.
        joined_inner: Whether one layer gives both halves of the feed-forward layer, the gate's first.
        input_bias: Whether the projections to queries, keys and values have a bias.
        output_bias: Whether the projection back has one.
        inner_bias: Whether the feed-forward layers have biases.
        norm_factor: Each branch is added to its norm's result times this; None: to that norm's input.
        parallel_branches: Whether the feed-forward layers get what attention gets, and both are added at once.
        branch_scale: Factor on what each branch gives before it is added.
        activation: Of the gate, or of the inner layer: "silu", "gelu_tanh", or without a gate "gelu", which is exact.
        norms: Names of a layer's norms.
        centred_norms: Whether norms of hidden states take the mean off and have biases.
        norm_offset: What norms add to their weights.
        score_scale: Factor on the scores; None: 1 / sqrt(head dim).
        score_cap: Scores s become cap * tanh(s / cap), Gemma 2 (2024); None: they stay.
        logit_cap: The same of the logits.
        logit_divisor: What the logits are divided by.
        normed_head: Whether the output layer's weights of each token are divided by their length.
        embedding_scale: Factor on word embeddings.
        experts: Of the layers that have some; None: no layer has.
    """

    normed: bool = False
    halves: bool = True
    turned_share: float = 1.0
    turned_layers: tuple[bool, ...] | None = None
    learned_positions: bool = False
    distances: bool = False
    rounded_divisor: float | None = None
    scaling: RotaryScaling | None = None
    local_base: float | None = None
    window: int | None = None
    windowed_layers: tuple[bool, ...] | None = None
    joined_input: bool = False
    grouped_input: bool = False
    gated: bool = True
    joined_inner: bool = False
    input_bias: bool = False
    output_bias: bool = False
    inner_bias: bool = False
    norm_factor: float | None = None
    parallel_branches: bool = False
    branch_scale: float = 1.0
    activation: str = "silu"
    norms: NormNames = TWO_NORMS
    centred_norms: bool = False
    norm_offset: float = 0.0
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    logit_divisor: float = 1.0
    normed_head: bool = False
    embedding_scale: float = 1.0
    experts: ExpertFacts | None = None

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, by its number in the whole model, has experts."""
        return self.experts is not None and self.experts.has_experts(layer)

    def has_turn(self, layer: int) -> bool:
        """Whether rotary positions turn the heads of a layer, by its number in the whole model."""
        if self.distances or not self.turned_share:
            return False
        return self.turned_layers is None or self.turned_layers[layer]

    def has_window(self, layer: int) -> bool:
        """Whether a layer, by its number in the whole model, sees the last tokens only."""
        if not self.window:
            return False
        return self.windowed_layers is None or self.windowed_layers[layer]


@dataclass(frozen=True)
class RotaryAngles:
    """Rotary positions of a model, worked out.

    Attributes:
        frequencies: Radians per position of each pair of places, float32 [turned / 2].
        amplitude: What cos and sin are multiplied with.
        local: The frequencies in layers with a window, with amplitude 1; None: those of all layers.
    """

    frequencies: NDArray[Any]
    amplitude: float = 1.0
    local: NDArray[Any] | None = None

    @classmethod
    def of(cls, facts: HeadFacts, *, base: float, head_dim: int) -> RotaryAngles:
        """Those of a model with heads of this size."""
        if not facts.turned_share:
            return cls(np.zeros(0, np.float32))
        turned = int(head_dim * facts.turned_share)
        local = None if facts.local_base is None else inverse_frequencies(facts.local_base, turned)
        if facts.scaling is None:
            return cls(inverse_frequencies(base, turned), local=local)
        return cls(facts.scaling.frequencies(base, turned), facts.scaling.amplitude, local)
