"""From a folder or a name to a PaddleNLP model with every weight in its place.

`load_model` builds the model that `resolve.py` found and then sets its parameters tensor by tensor,
straight from the files: PaddleNLP's own layout, or Hugging Face's, mapped by PaddleNLP's name table.
Beside the model only a slice of one tensor is held (see `parameters.py`), and for fused layers one tensor
with its parts. Under tensor parallelism a rank reads its part of each tensor and no more. PaddleNLP's
`from_pretrained` is not used, because it only logs missing weights, holds the state twice, and writes
a second copy of converted weights into the user's folder.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError, list_some
from finetune.families.config_file import read_config
from finetune.families.family import find_family, import_object
from finetune.models.layers import decoder_layers
from finetune.models.parameters import assign
from finetune.models.resolve import GENERATION_CONFIG, ResolvedModel, quantised_twice, with_weights
from finetune.models.reward_head import REWARD_WEIGHT, is_reward_config, reward_class
from finetune.models.shard_files import open_checkpoint
from finetune.models.tensor_readers import plan_packed, plan_readers
from finetune.models.vocabulary import VocabularyGrowth, assign_grown
from finetune.storage.checkpoints import TensorFiles
from finetune.storage.files import read_json_if_present
from finetune.storage.quantisation.stored_format import without_format

if TYPE_CHECKING:
    from finetune.models.quantised.loading import PackedLayerFiller
    from finetune.storage.quantisation.scheme import QuantisationScheme

_MAX_LISTED = 20
# Fields of a model's configuration that say how it was trained, not what it is.
_LAYOUT_FIELDS = {
    "tensor_parallel_degree": 1,
    "tensor_parallel_rank": 0,
    "pipeline_parallel_degree": 1,
    "virtual_pp_degree": 1,
    "sequence_parallel": False,
    "tensor_parallel_output": False,
}
# The same for the kernels that a GPU ran it with.
_KERNEL_FIELDS = (
    "use_flash_attention", "use_fused_rms_norm", "use_fused_rope", "use_fused_linear", "use_fused_dropout_add",
    "use_fused_linear_cross_entropy", "use_fused_head_and_loss_fn", "use_fast_layer_norm",
)  # fmt: skip


def load_model(
    resolved: ResolvedModel,
    *,
    dtype: str,
    config_overrides: Mapping[str, Any] | None = None,
    encoder: Any = None,
    growth: VocabularyGrowth | None = None,
    build: Callable[[Any, Any], Any] | None = None,
    quantisation: QuantisationScheme | None = None,
    keep_packed: bool = True,
    head_seed: int = 0,
) -> Any:
    """Builds the model and sets all its weights.

    Args:
        resolved: From `resolve_model`.
        dtype: Parameter type: "float32", "float16" or "bfloat16".
        config_overrides: Fields set on the PaddleNLP config, degrees of parallelism and flags of fused
            layers among them.
        encoder: When given, generation also stops at its end token, and pads with its padding token.
        growth: More embeddings than the files hold, for a tokenizer with more tokens.
        build: Class and config -> model; for a model that holds a part of the weights, such as a stage of a
            pipeline. None: `model_class(config)`.
        quantisation: Quantises the linear layers, each as it is read; None leaves them as they are in the files.
        keep_packed: Whether they hold the packed weights, which cannot be trained; else what those stand for.
        head_seed: Draws the head of a reward model where the files have none.

    Returns:
        A PaddleNLP causal language model, or a reward model (see `reward_head`) if the configuration says so.

    Raises:
        UserError: Weights missing, unknown or of another shape, all in one message; quantised in the files already.
    """
    import paddle
    from paddlenlp.transformers.model_utils import dtype_guard, no_init_weights

    resolved = with_weights(resolved)
    folder = resolved.folder
    assert folder is not None
    checkpoint = open_checkpoint(folder, resolved.family, resolved.config)
    overrides = dict(config_overrides or {}) | ({"vocab_size": growth.new} if growth else {})
    model_class = find_model_class(resolved)
    config = build_config(resolved, model_class, dtype=dtype, overrides=overrides)
    is_stored_packed = resolved.stored_format is not None
    if is_stored_packed and quantisation is not None:
        raise quantised_twice(resolved)
    is_packed = (quantisation is not None or is_stored_packed) and keep_packed
    with dtype_guard(dtype), no_init_weights(), paddle.LazyGuard() if is_packed else nullcontext():
        model = _build_model(build or (lambda cls, facts: cls(facts)), model_class, config, resolved.name)
    filler = _find_filler(model, checkpoint, resolved, quantisation, keep_packed=keep_packed)
    absent = _fill_parameters(model, checkpoint, resolved, growth=growth, filler=filler)
    if REWARD_WEIGHT in absent:
        model.score.draw(config, head_seed)
    _set_generation_config(model, folder, encoder)
    model.source_folder = folder  # what is trained keeps the files beside these weights
    model.eval()
    return model


def find_model_class(resolved: ResolvedModel) -> Any:
    """The class that its configuration asks for: the family's causal model, or the reward model on it."""
    model_class = import_object(resolved.family.class_path(resolved.config))
    return reward_class(model_class, resolved.family) if is_reward_config(resolved.config) else model_class


def _find_filler(
    model: Any,
    checkpoint: TensorFiles,
    resolved: ResolvedModel,
    quantisation: QuantisationScheme | None,
    *,
    keep_packed: bool,
) -> PackedLayerFiller | None:
    """What fills layers with packed weights; None where all weights are ordinary ones."""
    if quantisation is not None:
        from finetune.models.quantised.loading import LinearLayerQuantiser

        model.base_quantisation = quantisation  # adapters on it put this on record
        return LinearLayerQuantiser(model, quantisation, resolved.family, keep_packed=keep_packed)
    if resolved.stored_format and keep_packed:
        from finetune.models.quantised.loading import StoredLayerLoader

        tensors = plan_packed(type(model), model.config, checkpoint, family=resolved.family)
        return StoredLayerLoader(model, tensors, resolved.family)
    return None


def _build_model(build: Callable[[Any, Any], Any], model_class: Any, config: Any, name: str) -> Any:
    try:
        return build(model_class, config)
    except (AssertionError, ValueError, ZeroDivisionError, OverflowError) as error:
        reason = str(error).strip().splitlines()[-1:] or ["no reason is told"]
        raise UserError(
            f"model {name}: no model can be built from its config.json "
            f"({type(error).__name__}: {reason[0][:200]}): copy it again"
        ) from error


def load_weights(model: Any, folder: Path) -> None:
    """Sets all weights of a built model from the files of a checkpoint of the same model.

    Raises:
        UserError: Weights missing, unknown or of another shape, all in one message.
    """
    config = read_config(folder)
    source = ResolvedModel(folder, str(folder), config, find_family(config, folder))
    _fill_parameters(model, open_checkpoint(folder, source.family, config), source)


def build_config(
    resolved: ResolvedModel, model_class: Any, *, dtype: str, overrides: Mapping[str, Any] | None = None
) -> Any:
    """The PaddleNLP config: config.json as the family adapts it, then the overrides.

    Raises:
        UserError: An option that the family must not have, or a config.json that PaddleNLP cannot express.
    """
    import paddle

    refused = resolved.family.refused_options
    faults = [
        f"{name} is {overrides[name]!r}, but family {resolved.family.name} cannot have it: {why}. "
        f"Set {name} to false"
        for name, why in refused.items()
        if overrides and overrides.get(name)
    ]
    if faults:
        raise UserError(faults)
    adapted = resolved.family.adapt_config(resolved.config)
    for name in ("torch_dtype", "dtype", "transformers_version", "_name_or_path", *_LAYOUT_FIELDS):
        adapted.pop(name, None)  # also how it was laid out when it was trained: that is the run's affair
    if paddle.device.get_device() == "cpu":
        for name in _KERNEL_FIELDS:
            adapted.pop(name, None)
    if resolved.stored_format or adapted.get("quantization_config", False) is None:
        adapted = without_format(adapted)  # the layers are ordinary ones to PaddleNLP
    if not adapted.get("architectures"):
        adapted["architectures"] = [model_class.__name__]
    config = model_class.config_class.from_dict(adapted)
    # Set afterwards: the config's constructor loses some of the fuse flags on the way.
    for name, value in {**(overrides or {}), "dtype": dtype}.items():
        setattr(config, name, value)
    return config


def one_process_config(model: Any) -> Any:
    """PaddleNLP's config of a model, or a stage of one, without what says how it was laid out over processes."""
    saved = copy.deepcopy(model.config)
    for name, value in _LAYOUT_FIELDS.items():
        if hasattr(saved, name):
            setattr(saved, name, value)
    dtypes = (str(parameter.dtype).rpartition(".")[2] for parameter in model.parameters())
    saved.dtype = next((name for name in dtypes if "float" in name), saved.dtype)
    saved.architectures = [type(model).__name__]
    return saved


def _fill_parameters(
    model: Any,
    checkpoint: TensorFiles,
    resolved: ResolvedModel,
    *,
    growth: VocabularyGrowth | None = None,
    filler: PackedLayerFiller | None = None,
) -> list[str]:
    """Sets every parameter, or raises one UserError that lists all that does not fit.

    Returns:
        Parameters that the files lack and may lack.
    """
    model_class, config = type(model), model.config
    computed = list(resolved.family.computed_weights)
    planned = plan_readers(
        model_class,
        config,
        checkpoint,
        family=resolved.family,
        growth=growth,
        needs_whole=filler.needs_whole if filler else None,
    )
    readers = {name: planned[name] for name in _without(list(planned), computed)}
    shapes, done = [], set()
    parameters = model.state_dict()
    for name, parameter in parameters.items():
        if name not in readers or id(parameter) in done:
            continue
        array = filler.fill(name, readers[name]) if filler else readers[name]()
        done.add(id(parameter))
        if array is None:
            continue
        if tuple(array.shape) == tuple(parameter.shape):
            assign(parameter, array)
        elif growth and growth.covers(name) and growth.fits(array, tuple(parameter.shape)):
            assign_grown(parameter, array)
        else:
            shapes.append(f"{name} is {list(array.shape)} in the files, {list(parameter.shape)} in the model")
    missing = [name for name, parameter in parameters.items() if id(parameter) not in done]
    # The stages of a pipeline each hold a part of the model: weights of the others are no fault there.
    is_whole = len(decoder_layers(model)) == getattr(config, resolved.family.fields.num_layers)
    extra = [name for name in readers if name not in parameters and is_whole]
    if resolved.stored_format:  # AutoGPTQ gives every layer a bias
        extra = [name for name in extra if not name.endswith(".bias") or readers[name]().any()]
    _raise_for(
        resolved,
        missing=_without(missing, [*computed, *(model._keys_to_ignore_on_load_missing or ())]),
        extra=_without(extra, model_class._keys_to_ignore_on_load_unexpected or []),
        shapes=shapes,
    )
    return missing


def _without(names: list[str], patterns: list[str]) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def _raise_for(resolved: ResolvedModel, *, missing: list[str], extra: list[str], shapes: list[str]) -> None:
    faults = []
    for names, what in (
        (missing, "the model needs weights that the files lack"),
        (extra, "the files hold weights that the model does not know"),
        (shapes, "weights have another shape"),
    ):
        if names:
            listed = list_some(sorted(names), _MAX_LISTED)
            faults.append(f"model {resolved.name}: {what} ({len(names)}): {listed}")
    if faults:
        raise UserError([*faults, "config.json and the weight files do not belong together: copy both again"])


def _set_generation_config(model: Any, folder: Path, encoder: Any) -> None:
    from paddlenlp.generation import GenerationConfig

    if read_json_if_present(folder / GENERATION_CONFIG):
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    if encoder is not None:
        generation = model.generation_config
        listed = generation.eos_token_id if isinstance(generation.eos_token_id, list) else []
        ends = list(dict.fromkeys([encoder.eos_token_id, *listed]))
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        generation.pad_token_id = encoder.pad_token_id
