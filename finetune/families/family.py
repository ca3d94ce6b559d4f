"""What the rest of the project needs to know of a model family, as one frozen record per family.

A record holds facts only: class paths as dotted strings (imported when used), names of fields in
config.json, name patterns of modules. Whoever needs a fact asks the record; nobody branches on a
model type. A new family is one folder in this package, found by itself; see `finetune.families.registry`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.families.chat_format import ChatFormat
from finetune.families.gguf_form import GgufForm
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits, stage_faults
from finetune.families.record_parts import (
    ConfigFields,
    HuggingFaceForm,
    PrefixGeometry,
    TokenizerFacts,
    unchanged,
)
from finetune.families.registry import families, find_family, get_family, register
from finetune.families.rotary_config import longest_text
from finetune.families.tiny_recipe import TensorSpec, TinyRecipe

__all__ = [
    "ConfigFields", "Family", "HuggingFaceForm", "PrefixGeometry", "TokenizerFacts", "families", "find_family",
    "get_family", "import_object", "register",
]  # fmt: skip


def _no_variant(config: Mapping[str, Any]) -> str | None:
    return None


def _any_config(config: Mapping[str, Any], folder: Path | None) -> bool:
    return True


@dataclass(frozen=True)
class Family:
    """Facts of one model family.

    Attributes:
        name: Name on the command line.
        models: Published models that people know, as their authors call them.
        model_types: `model_type` values of config.json, PaddleNLP's and Hugging Face's.
        architectures: Class names in `architectures`, for configs without a `model_type`.
        model_class: Dotted path of the causal language model.
        understood: Fields of config.json that are read or refused beside those of the tiny configuration and of
            `fields`; see `config_fields`.
        variants: config.json -> dotted path of another class where `model_class` does not compute it; None elsewhere.
        base_prefix: First part of PaddleNLP's parameter names ("llama" in "llama.norm.weight").
        lora_target_modules: Regular expressions of the linear layers that LoRA adapts by default.
        embedding_module: Last part of the input embedding's module name.
        hugging_face: How Hugging Face's files differ from PaddleNLP's.
        entry_modules: Parts of the names of modules with weights that come before the first layer.
        head_module: The same for the projection onto the vocabulary.
        cpu_layers: Dotted path of the function that puts cheaper forms of the layers in place on CPU.
        positions_end: Whether a text longer than the config's positions cannot be computed (tables of
            positions end there); False where distances or positions of any size are worked out.
        fused_packing: How samples of a packed row are kept apart under fused attention: "rows" (the layers hand
            the end row of every key to FlashMask), "block" (a dense mask, which is exact but takes memory), or
            "refused" (nobody has looked).
        distance_option: Field of config.json that, when true, adds distances to the scores, which FlashMask
            cannot do.
        window_option: Field of config.json that says how many of the last tokens a token sees; None for a family
            without such a window.
        sees_ahead: Whether tokens of a prompt see what follows them in it; a prompt is then never learned.
        packing: Whether packed samples with a block mask equal separate samples.
        positions: How a packed row gives positions: "position_ids" (restarting at each sample) or
            "none" (the model takes no positions).
        chat_template: Name of the template for conversations where a folder has none of its own; or names by a token
            that only the tokenizers of models with this template have, the first that is met counts. None for plain
            text.
        chat_formats: The forms of conversations that models of this family were trained with, by the names that
            `chat_template` knows.
        adapt_config: config.json as found -> config.json as PaddleNLP reads it; raises UserError for
            what PaddleNLP cannot express. Must not change its argument.
        covers: Whether a config.json with one of `model_types`, and the folder that it stands in (None where there
            is none), really are of this family; for names that several architectures share. Where neither tells,
            all of their records say yes, and the model is refused.
        told_by: What tells this family from those that share its names, for that message.
        source_prefix: First part of the names in Hugging Face's files where PaddleNLP's name table
            lacks it on both sides; `base_prefix` then takes its place.
        computed_weights: Regular expressions of tensors that some files hold and others lack, because
            the model computes them itself.
        hidden_length_first: Whether hidden states are [length, batch, hidden] inside the model, not
            [batch, length, hidden].
        prefix_needs_cache: Whether the model looks at given past keys and values only with `use_cache`.
        sequence_parallel: Whether the family's layers can split rows over tensor-parallel ranks.
        refused_options: Options of the model's config that must stay off, and why.
        argument_folder: Folder with the argument files where it is not called like the family.
        tensor_splits: End of a layer's name, as a regular expression -> how tensor parallelism divides the
            layer; a kind of `finetune.families.tensor_splits`. Other layers are whole on every rank.
        gguf: How the format GGUF has the family; None where no export is made.
        weights: config.json as adapted -> all parameters, where they are not those of the tiny recipe in other sizes;
            see `weight_shapes`.
        memory: What a decoder layer keeps for its backward pass.
        memory_of: config.json as adapted -> the same, where it depends on how the model's layers are.
        left_out: Fields that transformers takes by itself where the configuration of a multimodal folder's text part
            leaves them out, as published ones do.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    model_class: str
    base_prefix: str
    lora_target_modules: tuple[str, ...]
    embedding_module: str
    prefix_postprocess: str
    tokenizer: TokenizerFacts
    tiny: TinyRecipe
    fields: ConfigFields = field(default_factory=ConfigFields)
    parallel: ParallelLimits = field(default_factory=ParallelLimits)
    models: str = ""
    packing: bool = True
    sees_ahead: bool = False
    positions: str = "position_ids"
    chat_template: str | Mapping[str, str] | None = None
    chat_formats: Mapping[str, ChatFormat] = field(default_factory=dict)
    head_module: str = "lm_head"
    fused_packing: str = "refused"
    distance_option: str | None = None
    window_option: str | None = None
    positions_end: bool = True
    cpu_layers: str | None = None
    adapt_config: Callable[[dict[str, Any]], dict[str, Any]] = unchanged
    understood: tuple[str, ...] = ()
    variants: Callable[[Mapping[str, Any]], str | None] = _no_variant
    covers: Callable[[Mapping[str, Any], Path | None], bool] = _any_config
    told_by: str = ""
    source_prefix: str = ""
    computed_weights: tuple[str, ...] = ()
    hidden_length_first: bool = False
    prefix_needs_cache: bool = False
    sequence_parallel: bool = False
    refused_options: Mapping[str, str] = field(default_factory=dict)
    argument_folder: str | None = None
    entry_modules: tuple[str, ...] = ("embed_tokens",)
    hugging_face: HuggingFaceForm = field(default_factory=HuggingFaceForm)
    tensor_splits: Mapping[str, str] = field(default_factory=dict)
    gguf: GgufForm | None = None
    weights: Callable[[Mapping[str, Any]], dict[str, TensorSpec]] | None = None
    memory: LayerMemory = field(default_factory=LayerMemory)
    memory_of: Callable[[Mapping[str, Any]], LayerMemory] | None = None
    left_out: Mapping[str, Any] = field(default_factory=dict)

    def prefix_geometry(self, config: Any) -> PrefixGeometry:
        """Key and value sizes for prefix tuning, from a config dict or a PaddleNLP config object."""
        num_heads = int(_read(config, self.fields.num_heads))
        num_kv_heads = _read(config, self.fields.num_kv_heads) or num_heads
        head_dim = _read(config, self.fields.head_dim) or _read(config, self.fields.hidden_size) // num_heads
        return PrefixGeometry(
            num_layers=int(_read(config, self.fields.num_layers)),
            num_heads=num_heads,
            num_kv_heads=int(num_kv_heads),
            head_dim=int(head_dim),
            postprocess=self.prefix_postprocess,
        )

    def class_path(self, config: Mapping[str, Any]) -> str:
        """Dotted path of the class that computes the model of a config.json."""
        return self.variants(config) or self.model_class

    def layer_memory(self, config: Mapping[str, Any]) -> LayerMemory:
        """What a layer of a model with this configuration, as adapted, keeps for its backward pass."""
        return self.memory if self.memory_of is None else self.memory_of(config)

    def width(self, config: Any) -> int:
        """Size of the hidden states, from a config dict or a PaddleNLP config object."""
        return int(_read(config, self.fields.hidden_size))

    def position_limit(self, config: dict[str, Any]) -> int | None:
        """Most tokens of a text that this model can compute, from a config.json; None without a limit."""
        if not self.positions_end:
            return None
        adapted = self.adapt_config(config)
        limit = _read(adapted, self.fields.max_positions)
        return longest_text(adapted, int(limit)) if limit else None

    def packed_mask(
        self, config: Any, *, fused: bool, half: bool, has_prefix: bool, shares_prompts: bool = False
    ) -> str | None:
        """The mask of packed rows: "start_end", "block", or None where there is none that keeps samples apart.

        Args:
            config: A config.json or a PaddleNLP config object.
            fused: Whether attention runs on a fused kernel.
            half: Whether in bfloat16 or float16, the only types of FlashMask.
            has_prefix: Whether a trained prefix stands in front, for which rows would have to be counted anew.
            shares_prompts: Whether answers share a prompt; the second is then farther from it in the row than in
                its text, so that one end row for each key cannot say where a window ends.
        """
        if not fused:
            return "block"
        if self.fused_packing == "refused":
            return None
        # What a config.json leaves unsaid is known once it is adapted.
        said = self.adapt_config(dict(config)) if isinstance(config, Mapping) else config
        has_distances = bool(_read(said, self.distance_option))
        takes_rows = self.fused_packing == "rows" and half and not has_prefix and not has_distances
        takes_rows = takes_rows and not (shares_prompts and _read(said, self.window_option))
        return "start_end" if takes_rows else "block"

    def parallel_faults(
        self,
        config: Any,
        *,
        tensor_degree: int,
        pipeline_degree: int,
        virtual_degree: int = 1,
        vocab_size: int | None = None,
    ) -> list[str]:
        """Reasons why the degrees do not fit this model; empty when they do.

        Args:
            config: config.json as PaddleNLP reads it (see `adapt_config`), or a PaddleNLP config object.
            tensor_degree: Ranks that hold slices of every layer.
            pipeline_degree: Stages that hold consecutive layers.
            virtual_degree: Chunks of layers per stage.
            vocab_size: Rows of the embeddings where they grow beyond those of the config.
        """
        faults = self.parallel.tensor_faults(functools.partial(_read, config), tensor_degree, vocab_size)
        num_layers = _read(config, self.fields.num_layers)
        if num_layers is not None:
            faults += stage_faults(num_layers, pipeline_degree, virtual_degree)
        return faults


def import_object(dotted_path: str) -> Any:
    """Imports "package.module.name" and returns the object."""
    module, _, name = dotted_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _read(config: Any, name: str | None) -> Any:
    if name is None:
        return None
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
