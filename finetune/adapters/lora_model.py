"""PaddleNLP's LoRA model with the kinds of updates that are known here, on a model that may be a part of a larger one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import paddle
from paddlenlp import peft

from finetune.adapters.adapted_modules import adapted_sizes
from finetune.adapters.dora import add_magnitude
from finetune.adapters.embedding_update import add_embedding_update, is_embedding, updated_embeddings
from finetune.adapters.files import StartWeights
from finetune.adapters.initial_weights import draw_input_matrix, find_starts, take_start
from finetune.adapters.lokr import add_kronecker
from finetune.adapters.lora_config import LayeredLoRAConfig
from finetune.adapters.mixed_lora import add_mixer
from finetune.adapters.projections import Projections, draw_projections
from finetune.adapters.vera import LocalProjections, add_vectors
from finetune.checkpoints.tensors_of_ranks import family_of, find_local_split
from finetune.errors import UserError
from finetune.machine.randomness.seeding import derive_seed
from finetune.models.quantised.layers import hold_packed, is_packed, release_packed


class LoRAModel(peft.LoRAModel):
    """PaddleNLP's, for a model that may be one process's part of a larger one.

    Args:
        model: The model with its weights.
        config: The adapter's settings.
        seed: The seed of the run. Every A is drawn whole by its module's name and then cut, so that it does
            not depend on how the model is divided.
        starts: What the matrices of a saved adapter started from, where that has left the base's weights; found
            again by default.
        projections: The shared matrices of a saved VeRA adapter; made from the configuration's key by default.
    """

    def __init__(
        self,
        model: Any,
        config: LayeredLoRAConfig,
        *,
        seed: int = 0,
        starts: StartWeights | None = None,
        projections: Projections | None = None,
    ):
        if config.vera and projections is None:
            num_in, num_out = adapted_sizes(model, config.target_modules)
            key = config.projection_prng_key
            projections = draw_projections(key, rank=config.r, num_in=num_in, num_out=num_out)
        config.tensor_parallel_degree = model.config.tensor_parallel_degree  # PaddleNLP warns otherwise
        # PaddleNLP has the matrix between A and B in one process only.
        is_mixed, config.lora_use_mixer = config.lora_use_mixer, False
        super().__init__(model, config)
        config.lora_use_mixer = is_mixed
        for name in _embeddings_among(model, config.target_modules):
            self._update_embedding(name, seed=derive_seed(seed, "lora", name))
        self.projections = LocalProjections(projections, model.config) if projections else None
        layers = {
            name: layer
            for name, layer in model.named_sublayers()
            if getattr(layer, "lora_A", None) is not None and not is_embedding(layer)
        }
        for name, layer in layers.items():
            self._start_layer(name, layer, seed=derive_seed(seed, "lora", name))
        if config.changes_base:
            self._take_starts(layers, starts, seed)
        if config.dtype == "float32":
            # Beside weights in half precision, which `paddle.amp.decorate` would make of all float32 ones.
            for layer in [*layers.values(), *updated_embeddings(model)]:
                layer._cast_to_low_precision = False

    def merge(self) -> None:
        """Adds all updates to the weights."""
        super().merge()
        for layer in updated_embeddings(self.model):
            layer.merge()

    def disable_lora(self) -> None:
        """Leaves all updates out until `enable_lora`."""
        super().disable_lora()
        for layer in updated_embeddings(self.model):
            layer.disable_lora = True

    def enable_lora(self) -> None:
        """Takes all updates in again."""
        super().enable_lora()
        for layer in updated_embeddings(self.model):
            layer.disable_lora = False

    def _update_embedding(self, name: str, *, seed: int) -> None:
        config = self.lora_config
        rule = config.rule
        layer = self.model.get_sublayer(name)
        rank, factor = rule.rank_of(name), rule.factor_of(name)
        add_embedding_update(layer, rank=rank, factor=factor, settings=config, seed=seed)

    def _start_layer(self, name: str, layer: Any, *, seed: int) -> None:
        config, base = self.lora_config, self.model.config
        if self.projections:
            add_vectors(name, layer, self.projections, rank=config.r, d_initial=config.d_initial)
            return
        if config.lokr:
            add_kronecker(name, layer, base, config, seed=seed)
            return
        layer.scaling = config.rule.factor_of(name)
        if config.changes_base:
            _check_start_rank(name, layer, base, config)
            return
        draw_input_matrix(layer.lora_A, base, kind=config.start, seed=seed)
        if config.lora_use_mixer:
            add_mixer(layer, seed=seed)
        if config.use_dora:
            add_magnitude(layer)

    def _take_starts(self, layers: Mapping[str, Any], starts: StartWeights | None, seed: int) -> None:
        config, base = self.lora_config, self.model.config
        seeds = {name: derive_seed(seed, "lora", name) for name in layers}
        found = (
            ((name, starts.read(name)) for name in layers)
            if starts
            else find_starts(layers, base, kind=config.start, seeds=seeds)
        )
        for name, whole in found:
            layers[name].start_factors = take_start(name, layers[name], base, whole)

    def _find_and_replace_module(
        self, model: Any, module_name: str, lora_config: LayeredLoRAConfig, enable_lora: Any
    ) -> None:
        layer = model.get_sublayer(module_name)
        if getattr(layer, "is_placeholder", False) or is_token_embedding(module_name, layer, model.config):
            return
        own = lora_config.of_layer(module_name)
        try:
            if is_packed(layer):
                self._replace_packed(model, module_name, own, enable_lora)
            else:
                super()._find_and_replace_module(model, module_name, own, enable_lora)
        except ValueError as error:
            raise UserError(
                f"lora_target_modules: {module_name} is a {type(layer).__name__}, but only linear layers can get "
                "a low-rank update: name it in modules_to_save to train it whole, or narrow the pattern."
            ) from error

    def _replace_packed(self, model: Any, module_name: str, *settings: Any) -> None:
        """Puts the update over a layer with a packed weight; PaddleNLP's layer is made without memory for one."""
        packed = release_packed(model.get_sublayer(module_name))
        with paddle.LazyGuard():
            super()._find_and_replace_module(model, module_name, *settings)
        adapted = model.get_sublayer(module_name)
        adapted.lora_A.initialize()
        adapted.lora_B.initialize()
        hold_packed(adapted, packed)


def _check_start_rank(name: str, layer: Any, base: Any, config: LayeredLoRAConfig) -> None:
    """A matrix has no more singular vectors, or orthogonal columns, than its smaller side is long."""
    split = find_local_split(f"{name}.weight", base)
    shape = (
        split.whole_shape(tuple(layer.weight.shape), base.tensor_parallel_degree)
        if split
        else layer.weight.shape
    )
    if layer.r > min(shape):
        raise UserError(
            f"lora_rank is {layer.r}, but {config.start} needs at most {min(shape)} for {name}, a matrix of "
            f"{list(shape)}: lower lora_rank, or start from something else"
        )


def is_token_embedding(name: str, layer: Any, config: Any) -> bool:
    """Whether a layer is the embedding of the tokens, or this rank's rows of it."""
    return is_embedding(layer) and name.rpartition(".")[2] == family_of(config).embedding_module


def _embeddings_among(model: Any, targets: Sequence[str]) -> list[str]:
    return [
        name
        for name, layer in model.named_sublayers()
        if any(re.fullmatch(each, name) for each in targets) and is_token_embedding(name, layer, model.config)
    ]
