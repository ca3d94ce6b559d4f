"""Exports one model: load, adapt, describe, trace, write."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.adapters.adapter_folder import has_reward_head
from finetune.data.templates.trained_template import carry_template
from finetune.errors import UserError, find_remedy
from finetune.families.decoder_description import check_description
from finetune.machine.screen import print_text
from finetune.models.resolve import ResolvedModel, trained_over_another, with_weights
from finetune.models.reward_head import is_reward_config
from finetune.serving.decoding.exported import PREFIX_FILE, PROGRAM_FILE, ExportedFacts
from finetune.serving.decoding.exported_weights import check_exported_weights
from finetune.serving.export.options import ExportOptions
from finetune.storage.files import fill_folder, read_json_if_present, write_json
from finetune.storage.lock import hold_output
from finetune.storage.quantisation.stored_format import without_format
from finetune.tokenizers.fast_encoder import find_vocabulary

if TYPE_CHECKING:
    from finetune.families.decoder_description import DecoderDescription
    from finetune.serving.export.packed_layers import GraphMatrix
    from finetune.serving.export.quantise import QuantisationReport
    from finetune.storage.quantisation.packed_weights import PackedMatrix
    from finetune.tokenizers.encoder import FamilyEncoder

REPORT_FILE = "quantisation_report.json"
_ADAPTER_FILES = (
    "lora_config.json", "prefix_config.json", "adapter_facts.json", "adapter_config.json", "pre_caches.npy",
)  # fmt: skip
"""Files beside an adapter that say nothing of the exported model, which holds the adapter already."""


def export(options: ExportOptions, resolved: ResolvedModel) -> ExportedFacts:
    """Writes the model as a static graph; the folder appears when all of it is there.

    Args:
        options: Checked.
        resolved: The model to export.

    Returns:
        What was exported.

    Raises:
        UserError: Weights, tokenizer or adapter cannot be used, or the disk is full.
    """
    if is_reward_config(resolved.config) or (options.lora_path and has_reward_head(options.lora_path)):
        raise UserError(
            f"{options.lora_path or options.model_name_or_path} is a reward model, and a static graph writes text: score "
            "the lines of a file with predict_generation.py --data_file ... --output_file ..., or give a model that writes"
        )
    check_description(resolved.family)
    if options.quantize and resolved.family.fields.experts:
        raise UserError(
            f"quantize is {options.quantize}, and {options.model_name_or_path} is a mixture of experts, whose matrices no "
            "quantised graph holds yet: leave --quantize out"
        )
    output = options.output_path
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_output(output, f"output_path {output}"))
        except OSError as error:
            raise _unwritable(output, error) from error
        return _export(options, resolved)


def _export(options: ExportOptions, resolved: ResolvedModel) -> ExportedFacts:
    import paddle

    from finetune.families.decoder_description import describe
    from finetune.tokenizers.encoder import load_encoder

    paddle.set_device(options.device)
    resolved = with_weights(resolved)
    folder = resolved.folder
    assert folder is not None
    tokenizer_folder = _tokenizer_folder(options, folder, resolved)
    encoder = load_encoder(tokenizer_folder, resolved.family, models=[folder])
    model, prefix = _load(options, resolved, encoder)
    quantised = _quantise(options, resolved, model, encoder, tokenizer_folder) if options.quantize else None
    description = describe(model, resolved.family)
    if prefix is not None:
        prefix = _ordered_prefix(prefix, description)
    facts = _facts(options, resolved, description, encoder, prefix)
    try:
        with fill_folder(options.output_path) as hidden:
            _copy_files(folder, tokenizer_folder, hidden)
            adapter = options.lora_path or options.prefix_path
            carry_template([adapter, folder] if adapter else [folder], hidden)
            if prefix is not None:
                np.save(hidden / PREFIX_FILE, prefix)
            facts.save(hidden)
            matrices = None
            if quantised:
                matrices = _write_quantised(options, resolved, model, description, quantised, hidden)
            _save_graph(description, hidden, dtype=options.dtype, matrices=matrices)
    except OSError as error:
        raise _unwritable(options.output_path, error) from error
    if quantised:
        print_text(*quantised[1].lines())
    return facts


def _quantise(
    options: ExportOptions,
    resolved: ResolvedModel,
    model: Any,
    encoder: FamilyEncoder,
    tokenizer_folder: Path,
) -> tuple[dict[str, PackedMatrix], QuantisationReport]:
    from finetune.serving.export.calibration_texts import read_texts
    from finetune.serving.export.quantise import quantise_model

    assert options.quantize
    calibration, measured = read_texts(options, encoder, tokenizer_folder)
    return quantise_model(
        model,
        resolved.family,
        options.quantize,
        group_size=options.group_size,
        calibration=calibration,
        measured=measured,
    )


def _write_quantised(
    options: ExportOptions,
    resolved: ResolvedModel,
    model: Any,
    description: DecoderDescription,
    quantised: tuple[dict[str, PackedMatrix], QuantisationReport],
    folder: Path,
) -> list[dict[str, GraphMatrix]]:
    """Weights for other programs and the report; the packed matrices of the graph. The model's weights are gone then."""
    from finetune.serving.export.packed_folder import write_packed_weights
    from finetune.serving.export.packed_layers import find_matrices
    from finetune.serving.export.quantise import layers_by_depth

    packed, report = quantised
    write_packed_weights(model, packed, folder, resolved, group_size=report.group_size)
    write_json(folder / REPORT_FILE, report.to_json())
    return find_matrices(description, layers_by_depth(model, resolved.family), packed)


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(
        f"output_path {output} cannot be written ({error.strerror or error}): {find_remedy(error.errno)}"
    )


def _load(
    options: ExportOptions, resolved: ResolvedModel, encoder: FamilyEncoder
) -> tuple[Any, NDArray[Any] | None]:
    """The model with its LoRA merged, and the prefix [prefix, 2 x layers, kv heads, head dim]."""
    from finetune.models.loading import load_model
    from finetune.storage.quantisation.record import read_scheme

    # Merging multiplies, which CPU does in float32 only.
    dtype = "float32" if options.lora_path else options.dtype
    # What an adapter was trained over, as ordinary weights, so that the graph answers as the adapter does.
    scheme = read_scheme(options.lora_path) if options.lora_path else None
    if scheme and resolved.stored_format:
        raise trained_over_another(resolved, options.lora_path, scheme)
    overrides: dict[str, Any] = {"use_cache": True}
    if options.quantize:  # files have the parts
        overrides |= {"fuse_attention_qkv": False, "fuse_attention_ffn": False}
    model = load_model(
        resolved, dtype=dtype, config_overrides=overrides, quantisation=scheme, keep_packed=False
    )
    if options.lora_path:
        from finetune.adapters.lora import load_lora

        adapted = _load_adapter(load_lora, model, options.lora_path, encoder)
        adapted.merge()
        return adapted.model, None
    if options.prefix_path:
        from finetune.adapters.prefix import load_prefix

        def load(model: Any, folder: Path) -> Any:
            return load_prefix(model, folder, family=resolved.family)

        return model, _prefix_of(_load_adapter(load, model, options.prefix_path, encoder), resolved)
    return model, None


def _load_adapter(load: Any, model: Any, folder: Path, encoder: FamilyEncoder) -> Any:
    from finetune.adapters.files import check_tokenizer

    check_tokenizer(folder, len(encoder.tokenizer))
    adapted = load(model, folder)
    adapted.eval()
    return adapted


def _prefix_of(adapted: Any, resolved: ResolvedModel) -> NDArray[Any]:
    import paddle

    geometry = resolved.family.prefix_geometry(adapted.model.config)
    with paddle.no_grad():
        flat = adapted.prefix_encoder(adapted.prefix_tokens.unsqueeze(0))
    values: NDArray[Any] = flat.astype("float32").numpy()
    return values.reshape(-1, 2 * geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)


def _ordered_prefix(prefix: NDArray[Any], description: DecoderDescription) -> NDArray[Any]:
    """[prefix, 2 x layers (keys first), kv heads, head dim] -> key, value of each layer in turn.

    [2 x layers, kv heads, prefix, head dim], the places of keys in the order of the exported weights.
    """
    from finetune.serving.export.layout import reorder_keys

    layers = description.shape.num_layers
    parts = prefix.transpose(1, 2, 0, 3)
    pairs = [
        (reorder_keys(parts[layer], description.shape), parts[layers + layer]) for layer in range(layers)
    ]
    return np.ascontiguousarray([part for pair in pairs for part in pair], dtype=np.float32)


def _facts(
    options: ExportOptions,
    resolved: ResolvedModel,
    description: DecoderDescription,
    encoder: FamilyEncoder,
    prefix: NDArray[Any] | None,
) -> ExportedFacts:
    shape = description.shape
    return ExportedFacts(
        family=resolved.family.name,
        dtype=options.dtype,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_positions=shape.max_positions,
        stop_ids=tuple(dict.fromkeys([encoder.eos_token_id, *encoder.chat_end_ids])),
        pad_token_id=encoder.pad_token_id,
        num_prefix_tokens=0 if prefix is None else prefix.shape[2],
        context_marks=shape.context_marks.ids if shape.context_marks else (),
    )


def _save_graph(
    description: DecoderDescription,
    folder: Path,
    *,
    dtype: str,
    matrices: list[dict[str, GraphMatrix]] | None = None,
) -> None:
    """Traces the graph and writes program and weights."""
    import paddle

    from finetune.serving.export.generation_graph import GenerationGraph

    graph = GenerationGraph(description, dtype, matrices)
    graph.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = paddle.jit.to_static(graph, input_spec=graph.input_spec(), full_graph=True)
        paddle.jit.save(traced, str(folder / PROGRAM_FILE.removesuffix(".json")))
    try:
        check_exported_weights(folder)
    except (UserError, OSError) as error:
        raise UserError(
            f"Paddle has not written the whole model into {folder.parent} ({error}): make room on that disk, raise the "
            "limit of file sizes (ulimit -f), or choose another disk"
        ) from None


def _tokenizer_folder(options: ExportOptions, folder: Path, resolved: ResolvedModel) -> Path:
    """The adapter's folder where it has a tokenizer of its own: it was trained with that one."""
    adapter = options.lora_path or options.prefix_path
    return adapter if adapter and find_vocabulary(adapter, resolved.family.tokenizer) else folder


def _copy_files(folder: Path, tokenizer_folder: Path, target: Path) -> None:
    """Configuration, generation settings, tokenizer and chat template, byte for byte but for how weights are packed."""
    from finetune.checkpoints.companions import copy_companions
    from finetune.models.other_parts import drop_other_parts

    copy_companions(tokenizer_folder, target)
    if tokenizer_folder != folder:
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
    config = read_json_if_present(target / "config.json")
    if config != (ordinary := without_format(config)):  # the graph holds ordinary weights
        write_json(target / "config.json", ordinary)
    for name in _ADAPTER_FILES:
        (target / name).unlink(missing_ok=True)
    drop_other_parts(target)
