"""From a model folder to one GGUF file and a Modelfile; what was written is read back with the format's library."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.families.family import Family, families
from finetune.merge.hf_out import hugging_face_config
from finetune.merge.lora_base import open_base
from finetune.merge.lora_plan import plan
from finetune.merge.progress_bar import show_progress
from finetune.models.resolve import resolve_model, with_weights
from finetune.models.reward_head import is_reward_config
from finetune.serving.gguf.metadata import (
    Sizes,
    read_sizes,
    write_positions,
    write_sizes,
    write_tokenizer,
)
from finetune.serving.gguf.templates import ChosenTemplate, choose_template, describe_model
from finetune.serving.gguf.tensors import TYPES, GgufTensor, plan_tensors
from finetune.serving.gguf.vocabulary import Vocabulary, read_vocabulary
from finetune.storage.output_folder import check_output, output_folder

WEIGHTS, MODELFILE = "model.gguf", "Modelfile"
_OPTION = "--output_path"
_ROTARY_FACTORS = "rope_freqs.weight"
_EMBEDDING, _INNER = "token_embd.weight", "blk.0.ffn_up.weight"


@dataclass(frozen=True)
class GgufFacts:
    """What an export says of itself.

    Attributes:
        architecture: llama.cpp's name.
        num_bytes: Size of the file.
        num_tensors: Tensors in it.
        narrow: Names of matrices that became F16 because their rows fit no blocks of Q8_0.
        sizes: Of the model.
    """

    architecture: str
    num_bytes: int
    num_tensors: int
    narrow: tuple[str, ...]
    sizes: Sizes


def export_gguf(model: str, output: Path, type_name: str, *, overwrite: bool = False) -> GgufFacts:
    """Writes the file and the Modelfile.

    Args:
        model: Folder or hub name of a whole model.
        output: Folder to make.
        type_name: A key of `TYPES`, for the matrices.
        overwrite: Whether the result of an earlier export is replaced.

    Raises:
        UserError: A family, a setting or a tokenizer that llama.cpp does not compute as the model was trained; no room.
    """
    resolved = resolve_model(model, needs_weights=False)
    family = resolved.family
    _check_family(model, resolved.config, family)
    if resolved.stored_format:
        raise UserError(
            f"{model} is quantised, and GGUF has forms of its own: give the model it was quantised from, or merge "
            "with --into dequantised first"
        )
    config = family.adapt_config(dict(resolved.config))
    sizes = read_sizes(config, family)
    folder = with_weights(resolved).folder
    assert folder is not None
    check_output(output, [folder], overwrite=overwrite, option=_OPTION)
    base = open_base(folder)
    tensors = plan_tensors(plan(base, [], hugging_face=True)[0], family, sizes, TYPES[type_name])
    shapes = {tensor.name: tensor.source.shape for tensor in tensors}
    vocabulary = read_vocabulary(folder, family.tokenizer, shapes[_EMBEDDING][0])
    chosen = choose_template(folder, family)
    with output_folder(
        output, {"source": str(folder), "kind": "gguf", "type": type_name}, option=_OPTION
    ) as hidden:
        writer = _start(folder, family, type_name)
        write_sizes(writer, sizes, config, family, inner=shapes[_INNER][0])
        writer.add_vocab_size(len(vocabulary.tokens))
        factors = None
        assert family.gguf is not None
        if family.gguf.has_rotary:
            theirs = hugging_face_config(resolved.config, family, dtype="float32")
            factors = write_positions(writer, sizes, theirs)
        write_tokenizer(writer, vocabulary, template=chosen.jinja, end=chosen.end)
        sums = _write(writer, hidden / WEIGHTS, tensors, factors)
        check_file(hidden / WEIGHTS, sums, vocabulary)
        _write_modelfile(hidden, chosen, vocabulary, family)
        num_bytes = (hidden / WEIGHTS).stat().st_size
    narrow = [tensor.name for tensor in tensors if tensor.type == "F16" and TYPES[type_name] == "Q8_0"]
    return GgufFacts(family.gguf.architecture, num_bytes, len(sums), tuple(narrow), sizes)


def _check_family(model: str, config: dict[str, Any], family: Family) -> None:
    if family.gguf is None:
        allowed = ", ".join(sorted(name for name, each in families().items() if each.gguf))
        raise UserError(
            f"{model} is of the family {family.name}, which is not exported to GGUF; allowed: {allowed}. Serve its "
            "Hugging Face folder (--save_format hf) with vLLM or transformers"
        )
    if is_reward_config(config):
        raise UserError(
            f"{model} is a reward model, which writes no text: GGUF files here are of models that do"
        )


def _start(folder: Path, family: Family, type_name: str) -> Any:
    import gguf

    assert family.gguf is not None
    writer = gguf.GGUFWriter(None, family.gguf.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(folder.resolve().name)
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[types[type_name]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _write(
    writer: Any, path: Path, tensors: Sequence[GgufTensor], factors: NDArray[Any] | None
) -> dict[str, int]:
    """Writes header and tensors, one in memory at a time; returns a checksum of every tensor's bytes."""
    import gguf

    sums = {}
    if factors is not None:
        writer.add_tensor_info(_ROTARY_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.source.shape,
            np.dtype(np.float32),
            tensor.num_bytes,
            raw_dtype=gguf.GGMLQuantizationType[tensor.type],
        )
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with show_progress(sum(tensor.num_bytes for tensor in tensors)) as advance:
            if factors is not None:
                writer.write_tensor_data(factors)
                sums[_ROTARY_FACTORS] = zlib.crc32(factors.tobytes())
            for tensor in tensors:
                encoded = tensor.encode()
                writer.write_tensor_data(encoded)
                sums[tensor.name] = zlib.crc32(encoded.data)
                advance(tensor.num_bytes)
    finally:
        writer.close()
    return sums


def check_file(path: Path, sums: dict[str, int], vocabulary: Vocabulary) -> None:
    """Reads a file back and compares every tensor and the tokens.

    Args:
        path: The file.
        sums: Checksums of the tensors' bytes as they were written, by name.
        vocabulary: The tokenizer as it was written.

    Raises:
        UserError: Something reads differently.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    found = {tensor.name: zlib.crc32(np.ascontiguousarray(tensor.data).data) for tensor in reader.tensors}
    wrong = sorted(name for name in {*sums, *found} if sums.get(name) != found.get(name))
    if reader.get_field("tokenizer.ggml.tokens").contents() != vocabulary.tokens:
        wrong.append("the tokens")
    if wrong:
        raise UserError(
            f"{path.name} reads back otherwise than it was written ({', '.join(wrong[:4])}): check the disk"
        )


def _write_modelfile(folder: Path, chosen: ChosenTemplate, vocabulary: Vocabulary, family: Family) -> None:
    text = describe_model(WEIGHTS, chosen, vocabulary, family)
    (folder / MODELFILE).write_text(text, encoding="utf-8")
