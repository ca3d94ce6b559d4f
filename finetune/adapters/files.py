"""Adapter weights on disk: safetensors under the names that PaddleNLP reads back.

`peft_model-00001-of-00001.safetensors` with its index is what PaddleNLP writes in its
unified checkpoints and what `LoRAModel.from_pretrained` and
`PrefixModelForCausalLM.from_pretrained` accept. PaddleNLP's pickled files
(`lora_model_state.pdparams`) are read too, through an unpickler that knows arrays only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from finetune.adapters.adapter_folder import PADDING_FACT, START_STEM, read_num_tokens
from finetune.adapters.base import base_model
from finetune.adapters.peft_config import PEFT_CONFIG
from finetune.adapters.peft_folder import open_peft_folder
from finetune.adapters.projections import write_projections
from finetune.checkpoints.tensors_of_ranks import LocalTensor, family_of, local_tensor
from finetune.checkpoints.writers import TensorSet, TensorSetWriter, WholeTensorWriter
from finetune.errors import UserError, list_some
from finetune.families.family import Family
from finetune.models.hf_names import embedding_name
from finetune.models.parameters import assign
from finetune.models.reward_head import is_reward_model
from finetune.processes.joint_steps import fail_on_all_ranks
from finetune.storage.checkpoints import ShardedCheckpoint, TensorFiles, open_indexed
from finetune.storage.dtypes import Array
from finetune.storage.files import write_json
from finetune.storage.quantisation.record import FACTS_FILE, QUANTISATION
from finetune.storage.rank_files import LORA_STEM, PREFIX_STEM

WEIGHTS_STEM = "peft_model"
LORA_FILES = TensorSet(WEIGHTS_STEM, LORA_STEM, always_index=True, index_facts={"type": "lora"})
PREFIX_FILES = TensorSet(WEIGHTS_STEM, PREFIX_STEM, always_index=True, index_facts={"type": "ptuning"})
START_FILES = TensorSet(START_STEM, START_STEM)
"""What A and B started from where that has left the base (PiSSA, OLoRA), under the same names."""
INDEX_FILE = LORA_FILES.index_name
PICKLED_FILES = ("lora_model_state.pdparams", "prefix_model_state.pdparams")


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


def adapter_tensors(model: Any) -> dict[str, LocalTensor]:
    """The same with what is known of their division over tensor-parallel ranks.

    The prefix encoder is whole on every rank.
    """
    config = base_model(model).config
    family = family_of(config)
    return {
        name: local_tensor(name, tensor, config, family)
        for name, tensor in sorted(adapter_state(model).items())
    }


def save_adapter(
    model: Any,
    folder: Path,
    writer: TensorSetWriter | None = None,
    *,
    num_tokens: int | None = None,
    whole: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Writes an adapter's weights, their index and its configuration.

    Args:
        model: The adapter on its base, or on a stage of it.
        folder: Where to write.
        writer: How weights become files; all ranks call this. None for one process and whole tensors.
        num_tokens: Tokens of the tokenizer it was trained with, added ones included; None leaves no record.
        whole: Makes the parameters whole while they are read, for sharding stage 3.
    """
    writer = writer or WholeTensorWriter()
    is_lora = hasattr(model, "lora_config")
    with whole():
        writer.write(adapter_tensors(model), folder, LORA_FILES if is_lora else PREFIX_FILES)
        if is_lora and getattr(model.lora_config, "changes_base", False):
            writer.write(_start_tensors(model), folder, START_FILES)
    with fail_on_all_ranks(writer.groups):
        if not writer.groups.is_first:
            return
        config = replace(model.lora_config if is_lora else model.prefix_config)
        # A degree above 1 would make PaddleNLP look for a file of each rank.
        if writer.writes_whole and config.tensor_parallel_degree > 1:
            config.tensor_parallel_degree = -1
        config.save_pretrained(str(folder))
        if is_lora and getattr(config, "save_projection", False):
            write_projections(folder, model.projections.whole)
        facts: dict[str, Any] = {} if num_tokens is None else {"num_tokens": num_tokens}
        if is_reward_model(base_model(model)):
            facts[PADDING_FACT] = base_model(model).config.pad_token_id
        if scheme := getattr(base_model(model), "base_quantisation", None):
            facts[QUANTISATION] = scheme.to_json()
        if facts:
            write_json(folder / FACTS_FILE, facts)


def check_tokenizer(folder: Path, num_tokens: int) -> None:
    """Compares a run's tokenizer with the one that an adapter was trained with, as far as that is on record.

    Args:
        folder: The adapter's folder.
        num_tokens: Tokens of the run's tokenizer, added ones included.

    Raises:
        UserError: They have different numbers of tokens.
    """
    recorded = read_num_tokens(folder)
    if recorded is not None and recorded != num_tokens:
        raise UserError(
            f"the adapter in {folder} was trained with a tokenizer of {recorded} tokens, but the tokenizer of "
            f"this run has {num_tokens}: {_tokenizer_remedy(folder)}"
        )


def count_embeddings(folder: Path, family: Family, *, num_tokens: int, vocab_size: int | None) -> int:
    """Embeddings that a model needs for a tokenizer and for an adapter that was trained with its own.

    Args:
        folder: The adapter's folder.
        family: Record of its base.
        num_tokens: Tokens of the tokenizer, added ones included.
        vocab_size: Embeddings of the base; None where its configuration does not say.

    Returns:
        As many as the adapter has where it trained them whole, which may be more than there are tokens: tables are
        often filled up to a round number.

    Raises:
        UserError: The adapter has embeddings for more tokens than the base, but the tokenizer is the base's.
    """
    table = embedding_name(family)
    if (folder / PEFT_CONFIG).is_file():
        whole = open_peft_folder(folder, family, tied=False).whole
        rows = whole[table].tensor.shape[0] if table in whole else 0
    elif (folder / INDEX_FILE).is_file():
        rows = open_indexed(folder, INDEX_FILE).names.get(table, (0,))[0]
    else:
        rows = 0
    if vocab_size is not None and num_tokens <= vocab_size < rows:
        raise UserError(
            f"the adapter in {folder} has {rows} embeddings, but the base {vocab_size} and the tokenizer of this run "
            f"{num_tokens} tokens: {_tokenizer_remedy(folder)}"
        )
    return max(rows, num_tokens)


def _tokenizer_remedy(folder: Path) -> str:
    return f"use the adapter's own tokenizer with --tokenizer_name_or_path {folder}"


def _start_tensors(model: Any) -> dict[str, LocalTensor]:
    config = base_model(model).config
    family = family_of(config)
    return {
        f"{name}.{end}": local_tensor(f"{name}.{end}", tensor, config, family)
        for name, layer in sorted(_weights_layer(model).named_sublayers())
        if (start := getattr(layer, "start_factors", None)) is not None
        for end, tensor in (("lora_A", start.left), ("lora_B", start.right))
    }


@dataclass(frozen=True)
class StartWeights:
    """What the matrices of a saved adapter started from.

    Attributes:
        files: The tensors.
    """

    files: TensorFiles | ShardedCheckpoint

    def read(self, layer: str) -> tuple[Array, Array]:
        """Both matrices [in, r] and [r, out] of a layer."""
        return self.files.read(f"{layer}.lora_A"), self.files.read(f"{layer}.lora_B")


def open_starts(folder: Path, config: Any) -> StartWeights | None:
    """Opens what `save_adapter` wrote beside an adapter that changes its base; None where there is nothing."""
    if not START_FILES.is_in(folder):
        return None
    return StartWeights(START_FILES.open(folder, family_of(config), config))


class AdapterWeights(Protocol):
    """Tensors of an adapter by PaddleNLP's names, in its form."""

    @property
    def names(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, by name."""

    def read(self, name: str) -> Array:
        """The tensor of that name; bfloat16 as uint16."""


def load_adapter_weights(
    model: Any, folder: Path, weights: AdapterWeights | None = None, *, is_stage: bool = False
) -> None:
    """Fills an adapter from a folder.

    Args:
        model: The adapter on its base, or on a stage of it.
        folder: Of the adapter.
        weights: Its tensors; None opens the folder's files in the forms of this project and of PaddleNLP.
        is_stage: Whether the base is a stage of a pipeline, which has a part of the layers: the rest of the
            adapter is for other stages.

    Raises:
        UserError: Weights are missing, unknown or of another shape; all are listed.
    """
    config = base_model(model).config
    degree = max(config.tensor_parallel_degree, 1)
    saved = weights or _open_weights(folder, config)
    expected = adapter_tensors(model)
    needs = {
        name: list(tensor.split.whole_shape(tensor.shape, degree) if tensor.split else tensor.shape)
        for name, tensor in expected.items()
    }
    found = {name: list(shape) for name, shape in saved.names.items()}
    faults = [f"missing {name} {needs[name]}" for name in sorted(needs.keys() - found.keys())]
    if not is_stage:
        faults += [f"unknown {name}" for name in sorted(found.keys() - needs.keys())]
    misfits = {
        name: (found[name], needs[name])
        for name in sorted(needs.keys() & found.keys())
        if found[name] != needs[name]
    }
    faults += [
        f"{name} has shape {ours}, the model needs {needed}" for name, (ours, needed) in misfits.items()
    ]
    if faults:
        other_vocabulary = any(
            _differ_by_vocabulary(*shapes, config.vocab_size) for shapes in misfits.values()
        )
        remedy = "Was it trained on another base?"
        if other_vocabulary:
            remedy = f"It was trained with another vocabulary: {_tokenizer_remedy(folder)}."
        raise UserError(f"the adapter in {folder} does not fit this model: {list_some(faults, 6)}. {remedy}")
    for name, tensor in expected.items():
        array = saved.read(name)
        if tensor.split:
            array = tensor.split.part(array, degree, config.tensor_parallel_rank)
        assign(tensor.read(), array)


def _differ_by_vocabulary(saved: list[int], needed: list[int], vocab_size: int) -> bool:
    """Whether two shapes differ only where the second has one row per token."""
    different = [pair for pair in zip(saved, needed, strict=False) if pair[0] != pair[1]]
    return len(saved) == len(needed) and [pair[1] for pair in different] == [vocab_size]


def _open_weights(folder: Path, config: Any) -> TensorFiles | ShardedCheckpoint:
    for files in (LORA_FILES, PREFIX_FILES):
        if files.is_in(folder):
            return files.open(folder, family_of(config), config)
    raise UserError(
        f"{folder} holds no adapter weights: expected {INDEX_FILE} or one of {', '.join(PICKLED_FILES)}."
    )
