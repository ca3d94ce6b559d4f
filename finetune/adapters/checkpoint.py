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


def save_adapter(model: Any, folder: Path) -> None:
    """Writes an adapter's weights, their index and its configuration."""
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
    faults += [
        f"{name} has shape {list(saved[name].shape)}, the model needs {list(expected[name].shape)}"
        for name in sorted(expected.keys() & saved.keys())
        if list(saved[name].shape) != list(expected[name].shape)
    ]
    if faults:
        shown = "; ".join(faults[:6]) + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
        raise UserError(
            f"the adapter in {folder} does not fit this model: {shown}. Was it trained on another base?"
        )
    for name, tensor in expected.items():
        tensor.set_value(saved[name].astype(tensor.dtype))


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
