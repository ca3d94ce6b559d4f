"""Which layers a LoRA run adapts, and which modules it trains whole, as people name them.

    all, all-linear       every linear layer of the decoder
    default               what suits the family
    q_proj, mlp.up_proj   the last parts of names, PaddleNLP's or Hugging Face's, separated by commas or blanks
    .*self_attn.*         any other text is a regular expression for the whole of PaddleNLP's name

Names of joined layers stand for their parts and the other way round, where that is the same set of weights. What
comes out are expressions that PaddleNLP's LoRA takes. Nothing here needs Paddle.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from finetune.adapters.pattern_matching import match_names
from finetune.errors import UserError
from finetune.families.family import Family, families
from finetune.families.record_parts import OUTPUT_LAYER
from finetune.families.tiny_recipe import TinyShape
from finetune.models.hf_names import JOINED_ELSEWHERE, JOINED_LAYERS, to_hugging_face
from finetune.models.reward_head import REWARD_WEIGHT, is_reward_config

ALL_LINEAR = ("all", "all-linear", "all_linear")
DEFAULT = "default"
_BARE = re.compile(r"[\w.-]+")
_SEVERAL = re.compile(r"[\w.-]+(?:\s*[,\s]\s*[\w.-]+)+,?")


def split_names(given: str | Sequence[str] | None) -> list[str]:
    """The single names and patterns of a setting; commas and blanks divide names, but not patterns."""
    texts = [given] if isinstance(given, str) else list(given or ())
    found: list[str] = []
    for text in map(str.strip, texts):
        found += re.split(r"[,\s]+", text.strip(",")) if _SEVERAL.fullmatch(text) else [text]
    return list(dict.fromkeys(each for each in found if each))


def resolve_targets(
    given: str | Sequence[str], family: Family, layers: Sequence[str], linear: Collection[str]
) -> list[str]:
    """Patterns for PaddleNLP of the layers that a setting names.

    Args:
        given: Value of `lora_target_modules`.
        family: Record of the model.
        layers: PaddleNLP's names of the model's layers with a weight.
        linear: Those of them that can have an update.

    Raises:
        UserError: An entry fits no layer, is no regular expression, or names a part of a joined layer alone.
    """
    names = split_names(given)
    patterns: list[str] = []
    unused: list[str] = []
    for name in names:
        if name.lower() in ALL_LINEAR:
            found = layer_patterns(_decoder_layers(linear, family), layers)
        elif name.lower() == DEFAULT:
            found = [each for each in family.lora_target_modules if match_names([each], layers)[0]]
        elif _BARE.fullmatch(name) and (fitting := _named(name, names, family, layers)):
            found = layer_patterns(fitting, layers)
        else:
            found = [name] if match_names([name], layers)[0] else []
        patterns += found
        unused += [] if found else [name]
    if unused:
        raise UserError(_unused_fault(unused, layers))
    return list(dict.fromkeys(patterns))


def _unused_fault(unused: Sequence[str], layers: Sequence[str]) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    joined = [
        f"{name} is a part of {whole} here: name {', '.join(parts)}, or set fuse_attention_qkv and "
        "fuse_attention_ffn to false. "
        for name in unused
        for whole, parts in JOINED_LAYERS.items()
        if name.rpartition(".")[2] in parts and whole in leaves
    ]
    return (
        f"lora_target_modules: no module matches {', '.join(map(repr, unused))}. {joined[0] if joined else ''}Give all, "
        "default, last parts of names, or regular expressions for whole module names; the last parts of this model's "
        f"names are: {', '.join(leaves)}."
    )


def resolve_saved(given: str | Sequence[str], family: Family, modules: Collection[str]) -> list[str]:
    """Last parts of PaddleNLP's names of the modules that `modules_to_save` names; unknown ones stay as they are.

    Args:
        given: The setting.
        family: Record of the model.
        modules: PaddleNLP's names of the modules with weights.
    """
    leaves = {name.rpartition(".")[2] for name in modules}
    known = {to_hugging_face(name, family): name for name in modules}
    found = []
    for name in split_names(given):
        fits = {ours.rpartition(".")[2] for theirs, ours in known.items() if _ends(theirs, name)}
        fits |= {ours.rpartition(".")[2] for ours in modules if _ends(ours, name)}
        # The embedding and the output layer also by the names that other families have for them.
        fits = fits or {own for own, names in _end_layers(family) if name in names and own in leaves}
        found += sorted(fits) or [name]
    return list(dict.fromkeys(found))


def resolve_layer_patterns(
    setting: str, given: Mapping[str, Any] | None, family: Family, layers: Sequence[str]
) -> dict[str, Any]:
    """A setting that gives layers values of their own, with expressions for PaddleNLP's names; the first that fits wins.

    Args:
        setting: Its name, for messages.
        given: peft's form: the end of a layer's name, PaddleNLP's or Hugging Face's, as a regular expression -> value.
        family: Record of the model.
        layers: PaddleNLP's names of the adapted layers.

    Raises:
        UserError: An expression fits no layer or is none.
    """
    resolved: dict[str, Any] = {}
    left = list(layers)
    for text, value in (given or {}).items():
        ours, theirs = (
            match_names([rf"(.*\.)?({text})"], spellings)[0]
            for spellings in (layers, [to_hugging_face(each, family) for each in layers])
        )
        fitting = [each for each in layers if each in ours or to_hugging_face(each, family) in theirs]
        if not fitting:
            raise UserError(_unused_fault([text], layers).replace("lora_target_modules", setting, 1))
        chosen = [each for each in fitting if each in left]
        resolved |= dict.fromkeys(layer_patterns(chosen, layers), value)
        left = [each for each in left if each not in chosen]
    return resolved


def _end_layers(family: Family) -> list[tuple[str, set[str]]]:
    """Embedding and output layer: last part of the name here, and in any family."""
    everyone = families().values()
    return [
        (family.embedding_module, {each.embedding_module for each in everyone}),
        (family.head_module, {OUTPUT_LAYER, *(each.head_module for each in everyone)}),
    ]


def layer_patterns(chosen: Collection[str], known: Sequence[str]) -> list[str]:
    """Regular expressions that fit the chosen names and no other known one, few where layers are alike.

    Args:
        chosen: Names out of `known`.
        known: All names; the numbers in them are those of layers.
    """
    wanted = set(chosen)
    alike: dict[str, set[str]] = {}
    for name in known:
        alike.setdefault(_any_number(name), set()).add(name)
    patterns = []
    for pattern, names in alike.items():
        patterns += [pattern] if names <= wanted else sorted(re.escape(name) for name in names & wanted)
    return patterns


def expected_parameters(family: Family, config: Mapping[str, Any]) -> list[str]:
    """Names that a family's parameters can have, before a model is built: with biases, which some models have.

    Args:
        family: Its record.
        config: Configuration of the model as the family adapts it.
    """
    layers = [f"{name}.{end}" for name in expected_layers(family, config) for end in ("weight", "bias")]
    names = [*_expected_shapes(family, config), *layers]
    if is_reward_config(config):
        names = [name for name in names if family.head_module not in name.split(".")]
        heads = [REWARD_WEIGHT]
    else:
        heads = [f"{head}.weight" for head in (family.head_module, OUTPUT_LAYER)]
    return list(dict.fromkeys([*names, *heads]))


def value_patterns(values: Mapping[str, float], known: Sequence[str], *, common: float) -> dict[str, float]:
    """Patterns for layers whose value is not the common one -> that value.

    Args:
        values: By the layer's name, out of `known`.
        known: Names of all layers.
        common: What needs no pattern.
    """
    layers_of: dict[float, list[str]] = {}
    for layer, value in values.items():
        if value != common:
            layers_of.setdefault(value, []).append(layer)
    return {
        pattern: value for value, layers in layers_of.items() for pattern in layer_patterns(layers, known)
    }


def expected_layers(family: Family, config: Mapping[str, Any]) -> list[str]:
    """Names of a family's layers with a weight, before a model is built; joined layers beside their parts.

    Args:
        family: Its record.
        config: Configuration of the model as the family adapts it.
    """
    return _with_joined([name.removesuffix(".weight") for name in _expected_shapes(family, config)], family)


def linear_layers(family: Family, config: Mapping[str, Any]) -> list[str]:
    """Those of `expected_layers` inside the decoder that a low-rank update can stand beside."""
    shapes = _expected_shapes(family, config)
    linear = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    return _decoder_layers(_with_joined(linear, family), family)


def _expected_shapes(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Weights of a model with as many layers as the configuration says, in sizes of no meaning."""
    shape = TinyShape(
        hidden_size=64,
        intermediate_size=64 * (family.tiny.inner_ratio or 2),
        num_layers=int(config.get(family.fields.num_layers) or 1),
        num_heads=4,
        num_kv_heads=4,
        vocab_size=64,
        max_length=64,
    )
    weights = family.tiny.weights(shape)
    return {name: spec.shape for name, spec in weights.items() if name.endswith(".weight")}


def _with_joined(layers: list[str], family: Family) -> list[str]:
    for joined, parts in JOINED_LAYERS.items():
        if joined in family.tensor_splits:
            layers += [f"{name.rpartition('.')[0]}.{joined}" for name in layers if _ends(name, parts[0])]
    return layers


def _decoder_layers(linear: Collection[str], family: Family) -> list[str]:
    """Those inside the numbered layers, as peft's all-linear has it: no embedding, no output layer."""
    return [
        name
        for name in linear
        if any(part.isdigit() for part in name.split("."))
        and name.rpartition(".")[2] not in (family.embedding_module, family.head_module)
    ]


def _named(name: str, names: Collection[str], family: Family, layers: Sequence[str]) -> list[str]:
    """Layers whose name in either form ends in `name`, or whose parts or whole it is."""
    found = [each for each in layers if _ends(each, name) or _ends(to_hugging_face(each, family), name)]
    if found:
        return found
    leaf = name.rpartition(".")[2]
    if wanted := JOINED_LAYERS.get(JOINED_ELSEWHERE.get(leaf, leaf)):
        parts = [[each for each in layers if _ends(each, part)] for part in wanted]
        return [each for some in parts for each in some] if all(parts) else []
    return [each for joined in _wholes(leaf, names) for each in layers if _ends(each, joined)]


def _wholes(part: str, names: Collection[str]) -> Iterator[str]:
    """Joined layers that a part belongs to, if its other parts are named as well."""
    leaves = {each.rpartition(".")[2] for each in names}
    for joined, parts in JOINED_LAYERS.items():
        if part in parts and leaves >= set(parts):
            yield joined


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _any_number(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
