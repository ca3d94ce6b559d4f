"""Adapter weights on disk: safetensors under the names that PaddleNLP reads back.

`peft_model-00001-of-00001.safetensors` with its index is what PaddleNLP writes in its
unified checkpoints and what `LoRAModel.from_pretrained` and
`PrefixModelForCausalLM.from_pretrained` accept. PaddleNLP's pickled files
(`lora_model_state.pdparams`) are read too, through an unpickler that knows arrays only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.files import write_json
from finetune.training.tensor_files import load_tensors, save_tensors

WEIGHTS_FILE = "peft_model-00001-of-00001.safetensors"
INDEX_FILE = "peft_model.safetensors.index.json"
FACTS_FILE = "adapter_facts.json"
"""What PaddleNLP's own configuration files have no place for."""
PICKLED_FILES = ("lora_model_state.pdparams", "prefix_model_state.pdparams")


def is_adapter(model: Any) -> bool:
    """Whether a model is wrapped by one of PaddleNLP's adapter classes."""
    return hasattr(model, "lora_config") or hasattr(model, "prefix_config")


def base_model(model: Any) -> Any:
    """The model inside an adapter, or the model itself."""
    return model.model if is_adapter(model) else model


def _weights_layer(model: Any) -> Any:
    """The layer whose state names stand in the file: the prefix encoder or the adapted model."""
    return model.prefix_encoder if hasattr(model, "prefix_config") else model.model


def adapter_state(model: Any) -> dict[str, Any]:
    """Trained tensors of an adapter by the names PaddleNLP stores them under.

    Modules that are trained whole are among them. A tensor with two names, as tied embeddings have, stands
    under the first.
    """
    state: dict[int, tuple[str, Any]] = {}
    for name, tensor in _weights_layer(model).state_dict().items():
        if not tensor.stop_gradient:
            state.setdefault(id(tensor), (name, tensor))
    return dict(state.values())


def save_adapter(model: Any, folder: Path, *, num_tokens: int | None = None) -> None:
    """Writes an adapter's weights, their index and its configuration.

    Args:
        model: The adapter on its base.
        folder: Where to write.
        num_tokens: Tokens of the tokenizer it was trained with, added ones included; None leaves no record.
    """
    state = adapter_state(model)
    save_tensors(folder / WEIGHTS_FILE, state)
    num_bytes = sum(int(tensor.size) * tensor.element_size() for tensor in state.values())
    write_json(
        folder / INDEX_FILE,
        {
            "metadata": {"total_size": num_bytes},
            "weight_map": {name: WEIGHTS_FILE for name in sorted(state)},
            "type": "lora" if hasattr(model, "lora_config") else "ptuning",
        },
    )
    config = model.lora_config if hasattr(model, "lora_config") else model.prefix_config
    config.save_pretrained(str(folder))
    if num_tokens is not None:
        write_json(folder / FACTS_FILE, {"num_tokens": num_tokens})


def check_tokenizer(folder: Path, num_tokens: int) -> None:
    """Compares a run's tokenizer with the one that an adapter was trained with, as far as that is on record.

    Args:
        folder: The adapter's folder.
        num_tokens: Tokens of the run's tokenizer, added ones included.

    Raises:
        UserError: They have different numbers of tokens.
    """
    path = folder / FACTS_FILE
    if not path.is_file():
        return
    try:
        recorded = json.loads(path.read_text(encoding="utf-8")).get("num_tokens")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the adapter's folder again") from error
    if recorded is not None and recorded != num_tokens:
        raise UserError(
            f"the adapter in {folder} was trained with a tokenizer of {recorded} tokens, but the tokenizer of "
            f"this run has {num_tokens}: {_tokenizer_cure(folder)}"
        )


def _tokenizer_cure(folder: Path) -> str:
    return f"use the adapter's own tokenizer with --tokenizer_name_or_path {folder}"


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Fills an adapter from a folder.

    Raises:
        UserError: Weights are missing, unknown or of another shape; all are listed.
    """
    saved = _read_weights(folder)
    expected = adapter_state(model)
    faults = [
        f"missing {name} {list(expected[name].shape)}" for name in sorted(expected.keys() - saved.keys())
    ]
    faults += [f"unknown {name}" for name in sorted(saved.keys() - expected.keys())]
    misfits = {
        name: (list(saved[name].shape), list(expected[name].shape))
        for name in sorted(expected.keys() & saved.keys())
        if list(saved[name].shape) != list(expected[name].shape)
    }
    faults += [
        f"{name} has shape {ours}, the model needs {needed}" for name, (ours, needed) in misfits.items()
    ]
    if faults:
        vocab_size = base_model(model).config.vocab_size
        other_vocabulary = any(_differ_by_vocabulary(*shapes, vocab_size) for shapes in misfits.values())
        cure = "Was it trained on another base?"
        if other_vocabulary:
            cure = f"It was trained with another vocabulary: {_tokenizer_cure(folder)}."
        shown = "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
        raise UserError(f"the adapter in {folder} does not fit this model: {shown}. {cure}")
    for name, tensor in expected.items():
        tensor.set_value(saved[name].astype(tensor.dtype))


def _differ_by_vocabulary(saved: list[int], needed: list[int], vocab_size: int) -> bool:
    """Whether two shapes differ only where the second has one row per token."""
    different = [pair for pair in zip(saved, needed, strict=False) if pair[0] != pair[1]]
    return len(saved) == len(needed) and [pair[1] for pair in different] == [vocab_size]


def _read_weights(folder: Path) -> dict[str, Any]:
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        weights: dict[str, Any] = {}
        for file in sorted(set(index["weight_map"].values())):
            weights.update(load_tensors(folder / file))
        return weights
    for name in PICKLED_FILES:
        if (folder / name).is_file():
            return _read_pickled(folder / name)
    raise UserError(
        f"{folder} holds no adapter weights: expected {INDEX_FILE} or one of {', '.join(PICKLED_FILES)}."
    )


def _read_pickled(path: Path) -> dict[str, Any]:
    import paddle

    from finetune.models.pickled_arrays import read_pdparams

    return {name: paddle.to_tensor(np.array(array.read())) for name, array in read_pdparams(path).items()}
