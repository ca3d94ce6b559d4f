"""What a GGUF file says of a model beside its tensors: sizes, positions, tokenizer, template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.families.family import Family
from finetune.families.rotary_config import scaling_of, with_scaling
from finetune.families.rotary_scaling import inverse_frequencies
from finetune.serving.gguf.vocabulary import Vocabulary

_YARN_USUAL = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_DEFAULT_EPSILON = {True: 1e-6, False: 1e-5}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, from its config.json.

    Attributes:
        num_layers: Decoder layers.
        num_heads: Heads of queries.
        num_kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        hidden_size: Width of the model.
        context: Most tokens of a text.
        is_window: Whether that is the length up to which a window of attention changes nothing.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    context: int
    is_window: bool


def read_sizes(config: Mapping[str, Any], family: Family) -> Sizes:
    """The sizes of a configuration as the family adapts it.

    Raises:
        UserError: It does not say how long texts may be, or asks for what llama.cpp does not compute.
    """
    assert family.gguf is not None
    for name, value in family.gguf.required.items():
        if config.get(name, value) != value:
            raise UserError(
                f"config.json has {name} {config[name]!r}, but llama.cpp's {family.name} computes {value!r} only"
            )
    geometry = family.prefix_geometry(config)
    context = config.get(family.fields.max_positions)
    window = int((config.get(family.window_option) if family.window_option else None) or 0)
    if not context:
        raise UserError(
            f"config.json lacks {family.fields.max_positions}, the length of texts that the GGUF file has to tell: "
            "add it"
        )
    is_window = 0 < window < int(context)
    return Sizes(
        geometry.num_layers,
        geometry.num_heads,
        geometry.num_kv_heads,
        geometry.head_dim,
        family.width(config),
        window if is_window else int(context),
        is_window,
    )


def write_sizes(writer: Any, sizes: Sizes, config: Mapping[str, Any], family: Family, *, inner: int) -> None:
    """Writes sizes and the epsilon of norms.

    Args:
        writer: A `gguf.GGUFWriter`.
        sizes: Of the model.
        config: As the family adapts it.
        family: Record.
        inner: Width inside the feed-forward layers.
    """
    form = family.gguf
    assert form is not None
    writer.add_block_count(sizes.num_layers)
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(sizes.num_heads)
    writer.add_head_count_kv(sizes.num_kv_heads)
    epsilon = float(config.get(form.epsilon, _DEFAULT_EPSILON[form.is_rms]))
    (writer.add_layer_norm_rms_eps if form.is_rms else writer.add_layer_norm_eps)(epsilon)
    if form.has_rotary:
        writer.add_key_length(sizes.head_dim)
        writer.add_value_length(sizes.head_dim)
        writer.add_rope_dimension_count(sizes.head_dim)


def write_positions(writer: Any, sizes: Sizes, config: Mapping[str, Any]) -> NDArray[Any] | None:
    """Writes the rotary base and how positions are stretched.

    Stretched by the length of texts ("dynamic") nothing is: up to the context it changes nothing.

    Args:
        writer: A `gguf.GGUFWriter`.
        sizes: Of the model.
        config: In transformers' fields.

    Returns:
        What each pair's frequency is divided by, (head_dim / 2,) float32, where the file holds that as a tensor.

    Raises:
        UserError: Settings of yarn that GGUF has no place for.
    """
    import gguf

    adapted = with_scaling(dict(config))
    base = float(adapted.get("rope_theta") or 10000.0)
    writer.add_rope_freq_base(base)
    settings = adapted.get("rope_scaling") or {}
    kind = settings.get("rope_type")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(settings["factor"]))
    elif kind == "yarn":
        _write_yarn(writer, settings, int(adapted["max_position_embeddings"]))
    elif kind == "llama3":
        scaling = scaling_of(SimpleNamespace(**adapted))
        assert scaling is not None
        slowed = scaling.frequencies(base, sizes.head_dim)
        factors: NDArray[Any] = (inverse_frequencies(base, sizes.head_dim) / slowed).astype(np.float32)
        return factors
    return None


def _write_yarn(writer: Any, settings: Mapping[str, Any], longest: int) -> None:
    import gguf

    known = {"rope_type", "factor", "original_max_position_embeddings"}
    for name, value in settings.items():
        if name not in known and value not in (None, _YARN_USUAL.get(name)):
            raise UserError(
                f"config.json has {name} {value!r} for yarn, which the export to GGUF does not have: serve the "
                "Hugging Face folder with vLLM or transformers"
            )
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(settings["factor"]))
    writer.add_rope_scaling_orig_ctx_len(int(settings.get("original_max_position_embeddings") or longest))


def write_tokenizer(writer: Any, vocabulary: Vocabulary, *, template: str | None, end: str) -> None:
    """Writes the tokenizer and the chat template.

    Args:
        writer: A `gguf.GGUFWriter`.
        vocabulary: The tokenizer.
        template: Jinja text.
        end: Token by which the template ends an answer; "" where it is the end of the sequence.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for role, index in vocabulary.roles.items():
        getattr(writer, f"add_{role}_token_id")(index)
    if end and (place := vocabulary.find(end)) is not None:
        writer.add_eot_token_id(place)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.has_prefix)
    if template is not None:
        writer.add_chat_template(template)
