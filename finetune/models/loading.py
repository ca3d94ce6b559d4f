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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError, list_some
from finetune.families.config_file import read_config
from finetune.families.family import Family, find_family, import_object
from finetune.families.tensor_splits import find_split
from finetune.models.layers import decoder_layers
from finetune.models.parameters import assign, join_blocks
from finetune.models.resolve import GENERATION_CONFIG, ResolvedModel, with_weights
from finetune.models.shard_files import open_checkpoint
from finetune.models.vocabulary import VocabularyGrowth, assign_grown, grown_part_reader
from finetune.storage.checkpoints import TensorFiles
from finetune.storage.files import read_json_if_present
from finetune.storage.splits import Split

Reader = Callable[[], NDArray[Any]]
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

    Returns:
        A PaddleNLP causal language model.

    Raises:
        UserError: Weights missing, unknown or of another shape, all in one message.
    """
    from paddlenlp.transformers.model_utils import dtype_guard, no_init_weights

    resolved = with_weights(resolved)
    folder = resolved.folder
    assert folder is not None
    checkpoint = open_checkpoint(folder, resolved.family, resolved.config)
    overrides = dict(config_overrides or {}) | ({"vocab_size": growth.new} if growth else {})
    model_class = import_object(resolved.family.model_class)
    config = build_config(resolved, model_class, dtype=dtype, overrides=overrides)
    with dtype_guard(dtype), no_init_weights():
        try:
            model = build(model_class, config) if build else model_class(config)
        except (AssertionError, ValueError, ZeroDivisionError, OverflowError) as error:
            reason = str(error).strip().splitlines()[-1:] or ["no reason is told"]
            raise UserError(
                f"model {resolved.name}: no model can be built from its config.json "
                f"({type(error).__name__}: {reason[0][:200]}): copy it again"
            ) from error
    _fill_parameters(model, checkpoint, resolved, growth=growth)
    _set_generation_config(model, folder, encoder)
    model.eval()
    return model


def load_weights(model: Any, folder: Path) -> None:
    """Sets all weights of a built model from the files of a checkpoint of the same model.

    Raises:
        UserError: Weights missing, unknown or of another shape, all in one message.
    """
    config = read_config(folder)
    source = ResolvedModel(folder, str(folder), config, find_family(config))
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
    if adapted.get("quantization_config", False) is None:
        del adapted["quantization_config"]
    if not adapted.get("architectures"):
        adapted["architectures"] = [resolved.family.architectures[0]]
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
) -> None:
    """Sets every parameter, or raises one UserError that lists all that does not fit."""
    model_class, config = type(model), model.config
    computed = list(resolved.family.computed_weights)
    planned = plan_readers(model_class, config, checkpoint, family=resolved.family, growth=growth)
    readers = {name: planned[name] for name in _without(list(planned), computed)}
    shapes, done = [], set()
    parameters = model.state_dict()
    for name, parameter in parameters.items():
        if name not in readers or id(parameter) in done:
            continue
        array = readers[name]()
        done.add(id(parameter))
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
    _raise_for(
        resolved,
        missing=_without(missing, [*computed, *(model._keys_to_ignore_on_load_missing or ())]),
        extra=_without(extra, model_class._keys_to_ignore_on_load_unexpected or []),
        shapes=shapes,
    )


def _without(names: list[str], patterns: list[str]) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def plan_readers(
    model_class: Any,
    config: Any,
    checkpoint: TensorFiles,
    *,
    family: Family,
    growth: VocabularyGrowth | None = None,
) -> dict[str, Reader]:
    """Parameter name -> function that reads what this rank's parameter must hold.

    Nothing is read yet. Weights that the model does not know keep their names, to be reported. A growing
    vocabulary matters here only for tensors that are split over cards; others grow as they are assigned.

    Tensors are taken apart, then divided over the ranks, then joined, so that a layer that is fused in the model
    but not in the files is joined from this rank's parts.
    """
    readers = _paddle_readers(checkpoint, _name_table(model_class, config, family))
    readers = _with_unfused(model_class, config, readers)
    degree, rank = config.tensor_parallel_degree, config.tensor_parallel_rank
    if degree <= 1:
        return _with_fused(model_class, config, readers)
    for name, read in readers.items():
        split = find_split(family, name, config, degree=degree)
        if split and growth and growth.covers(name):
            readers[name] = grown_part_reader(read, growth, split, degree=degree, rank=rank)
        elif split:
            readers[name] = _split_reader(read, split, degree=degree, rank=rank)
    local = copy.copy(config)
    for field in (family.fields.num_heads, family.fields.num_kv_heads):
        if field:
            setattr(local, field, getattr(config, field) // degree)
    return _with_fused(model_class, local, readers)


def _name_table(model_class: Any, config: Any, family: Family) -> dict[str, Any]:
    """PaddleNLP's mappings by Hugging Face's names, with the first parts that it may lack."""
    mappings = model_class._get_name_mappings(config)
    if not family.source_prefix:
        return {mapping.source_name: mapping for mapping in mappings}
    return {
        f"{family.source_prefix}.{mapping.source_name}": replace(
            mapping, target_name=f"{family.base_prefix}.{mapping.target_name}"
        )
        for mapping in mappings
    }


def _paddle_readers(checkpoint: TensorFiles, mappings: Mapping[str, Any]) -> dict[str, Reader]:
    """Tensors under PaddleNLP's names and in its layout, read when called.

    Hugging Face's linear layers are stored as [out, in], PaddleNLP's as [in, out]. Names that the table
    does not know keep their own, to be reported.
    """
    names = checkpoint.names
    if not _is_torch_layout(checkpoint, mappings):
        return {name: _reader(checkpoint, name) for name in names}
    readers = {}
    for name in names:
        mapping = mappings.get(name)
        if mapping is None:
            readers[name] = _reader(checkpoint, name)
        else:
            readers[mapping.target_name] = _mapped_reader(checkpoint, name, mapping)
    return readers


def _is_torch_layout(checkpoint: TensorFiles, mappings: Mapping[str, Any]) -> bool:
    if checkpoint.format is not None:
        return checkpoint.format == "pt"
    # Files without the mark: told by a name that only Hugging Face uses.
    targets = {mapping.target_name for mapping in mappings.values()}
    return any(name in mappings and name not in targets for name in checkpoint.names)


def _reader(checkpoint: TensorFiles, name: str) -> Reader:
    return lambda: checkpoint.read(name)


def _mapped_reader(checkpoint: TensorFiles, name: str, mapping: Any) -> Reader:
    return lambda: mapping.run({name: checkpoint.read(name)}, name)


def _with_fused(model_class: Any, config: Any, sources: dict[str, Reader]) -> dict[str, Reader]:
    """Joins query/key/value and gate/up weights where the config's fuse flags ask for it.

    PaddleNLP gives the work as (parts..., whole) -> function.
    """
    readers = dict(sources)
    actions, _ = model_class.get_fuse_or_split_param_convert_actions(config, list(sources), is_fuse=True)
    for (*parts, whole), action in actions.items():
        readers[whole] = _fused_reader([readers.pop(part) for part in parts], action)
    return readers


def _with_unfused(model_class: Any, config: Any, sources: dict[str, Reader]) -> dict[str, Reader]:
    """Takes apart query/key/value and gate/up weights that the files join and the config does not."""
    readers = dict(sources)
    actions, _ = model_class.get_fuse_or_split_param_convert_actions(config, list(sources), is_fuse=False)
    for (*parts, whole), action in actions.items():
        source = readers.pop(whole)
        readers |= {part: _part_reader(source, action, index) for index, part in enumerate(parts)}
    return readers


def _split_reader(whole: Reader, split: Split, *, degree: int, rank: int) -> Reader:
    def read() -> NDArray[Any]:
        array = whole()
        places = split.places(array.shape, degree, rank)
        return array[places[0]] if len(places) == 1 else join_blocks(array, places, split.axis)

    return read


def _fused_reader(parts: list[Reader], action: Callable[[list[NDArray[Any]]], NDArray[Any]]) -> Reader:
    return lambda: action([np.asarray(part()) for part in parts])


def _part_reader(whole: Reader, action: Callable[[NDArray[Any]], Any], index: int) -> Reader:
    return lambda: action(np.asarray(whole()))[index]


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
