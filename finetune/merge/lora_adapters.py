"""Reads adapters, whoever wrote them, into one form: low-rank updates and whole tensors under PaddleNLP's names.

Three forms are known: what a run of this project leaves (`peft_model*.safetensors`, or one file per rank),
PaddleNLP's `lora_model_state.pdparams`, both beside `lora_config.json`, and peft's, which is read in `peft_adapters`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.adapters.adapter_folder import (
    LORA_CONFIG,
    PREFIX_CONFIG,
    START_STEM,
    check_paddle_lora,
    name_paddlenlp_kind,
    paddle_rule,
    read_num_tokens,
)
from finetune.adapters.leading_vectors import leading_vectors
from finetune.adapters.peft_config import PEFT_CONFIG, check_peft_type
from finetune.adapters.peft_folder import WholeTensor, check_patterns
from finetune.adapters.projections import (
    PROJECTIONS_FILE,
    Projections,
    draw_projections,
    read_projections,
)
from finetune.adapters.scaling import ScalingRule
from finetune.adapters.update_tensors import Matrices, name_parts
from finetune.errors import UserError
from finetune.merge.layer_updates import FindProjections, LayerTensors, unknown_inputs
from finetune.merge.row_blocks import AnyUpdate, Update
from finetune.merge.source import ADAPTER, LORA, open_source
from finetune.storage.checkpoints import TensorFiles, open_indexed
from finetune.storage.dtypes import as_float32
from finetune.storage.files import read_json_if_present


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to a model.

    Attributes:
        folder: Where it lies.
        path: The first file of its weights, for messages.
        config: Its configuration file as found.
        rule: Rank and factor of its layers.
        updates: PaddleNLP's name of a layer -> update of its weight [in, out].
        whole: PaddleNLP's name of a tensor -> what takes its place.
        num_tokens: Tokens of the tokenizer it was trained with; None when that is not on record.
        is_peft: Whether it is in peft's form.
        has_starts: Whether the updates take out what A and B started from, which is on record.
        matrices: PaddleNLP's name of a layer -> the tensors that its update is made of.
        projections: VeRA's shared matrices.
    """

    folder: Path
    path: Path
    config: Mapping[str, Any]
    rule: ScalingRule
    updates: Mapping[str, AnyUpdate]
    whole: Mapping[str, WholeTensor]
    num_tokens: int | None = None
    is_peft: bool = False
    has_starts: bool = False
    matrices: Mapping[str, Matrices] = field(default_factory=dict)
    projections: Projections | None = None

    @property
    def needs_unchanged_base(self) -> bool:
        """Whether A and B start as parts of the base's weights (PiSSA), which have to be found there again."""
        return self.rule.pissa and not self.has_starts


def check_adapter_folder(folder: Path) -> None:
    """Says what is wrong with a folder that is no LoRA adapter.

    Raises:
        UserError: It does not exist, or holds a prefix, a model or nothing of use.
    """
    if not folder.is_dir():
        raise UserError(f"--lora_path {folder} is no folder: give the output folder of a LoRA run")
    if (folder / PREFIX_CONFIG).is_file():
        raise UserError(
            f"--lora_path {folder} holds no LoRA but a prefix: keys and values before the text, which no weight can "
            "take up. Serve it as it is: python predict_generation.py --model_name_or_path <base> "
            f"--prefix_path {folder}"
        )
    if (folder / PEFT_CONFIG).is_file():
        check_peft_type(folder, read_json_if_present(folder / PEFT_CONFIG))
    if not any((folder / name).is_file() for name in (LORA_CONFIG, PEFT_CONFIG)):
        if fault := name_paddlenlp_kind(folder):
            raise UserError(f"--lora_path {folder} {fault}")
        what = "a whole model, which needs no merge" if (folder / "config.json").is_file() else "no adapter"
        raise UserError(
            f"--lora_path {folder} holds {what}: expected {LORA_CONFIG} or {PEFT_CONFIG} there. Give the output "
            "folder (or a checkpoint) of a LoRA run"
        )


def named_base(folder: Path) -> str | None:
    """The base that an adapter's configuration names."""
    name = LORA_CONFIG if (folder / LORA_CONFIG).is_file() else PEFT_CONFIG
    base = read_json_if_present(folder / name).get("base_model_name_or_path")
    return str(base) if base else None


def read_paddle_adapter(folder: Path, num_inputs: Callable[[str], int] = unknown_inputs) -> Adapter:
    """Reads an adapter of this project or of PaddleNLP; its tensors stay in their files.

    Args:
        folder: Of the adapter.
        num_inputs: Gives the rows of the base's weight of a layer, by PaddleNLP's name; 0 where it has none.

    Raises:
        UserError: Files are missing or damaged, or it is of a kind that cannot be merged.
    """
    config = read_json_if_present(folder / LORA_CONFIG)
    _check_kind(folder, config)
    source = open_source(folder, prefers_whole=True)
    if source.kind not in (LORA, ADAPTER):
        raise UserError(
            f"{folder} holds {LORA_CONFIG} but the weights of a {source.kind}: give the folder of the adapter alone"
        )
    path = source.files.first
    matrices: dict[str, Matrices] = {}
    whole = {}
    for tensor in source.tensors():
        if parts := name_parts(tensor.name):
            found = matrices.setdefault(parts[0], Matrices(tensor.parts[0].path))
            found.tensors[parts[1]] = tensor
        else:
            whole[tensor.name] = WholeTensor(tensor)
    rule = paddle_rule(config)
    check_patterns(folder / LORA_CONFIG, rule, list(matrices))
    layers = LayerTensors(
        matrices, rule, num_inputs=num_inputs, find_projections=_projections_finder(folder, config, rule)
    )
    updates, projections = layers.updates()
    num_tokens = read_num_tokens(folder)
    starts = _open_starts(folder)
    if starts:
        updates = {layer: _without_start(layer, each, rule, starts) for layer, each in updates.items()}
    elif config.get("init_lora_weights") == "olora":
        raise UserError(
            f"{folder} was trained with init_lora_weights olora and lacks {START_STEM}.safetensors, what it started from: "
            "copy it there from the output folder of the run"
        )
    return Adapter(
        folder,
        path,
        config,
        rule,
        updates,
        whole,
        num_tokens,
        has_starts=starts is not None,
        matrices=matrices,
        projections=projections,
    )


def _projections_finder(folder: Path, config: Mapping[str, Any], rule: ScalingRule) -> FindProjections:
    """Finds VeRA's shared matrices beside an adapter, or makes them from its key."""

    def find(num_in: int, num_out: int) -> Projections:
        found = read_projections(folder)
        if found is None:
            key = int(config.get("projection_prng_key") or 0)
            return draw_projections(key, rank=rule.rank, num_in=num_in, num_out=num_out)
        found.check(folder / PROJECTIONS_FILE, rank=rule.rank, num_in=num_in, num_out=num_out)
        return found

    return find


def _open_starts(folder: Path) -> TensorFiles | None:
    """What A and B started from where that has left the base; None where it is not on record."""
    name = f"{START_STEM}.safetensors"
    if (folder / f"{name}.index.json").is_file():
        return open_indexed(folder, f"{name}.index.json")
    return TensorFiles([folder / name]) if (folder / name).is_file() else None


def _without_start(layer: str, update: AnyUpdate, rule: ScalingRule, starts: TensorFiles) -> AnyUpdate:
    """The update of the base as it was: A and B as trained, less what they started from."""
    assert isinstance(update, Update)
    if missing := [end for end in ("lora_A", "lora_B") if f"{layer}.{end}" not in starts.names]:
        raise UserError(
            f"{update.path.parent} lacks {layer}.{missing[0]} in {START_STEM}: copy the adapter again"
        )

    def factors() -> tuple[NDArray[Any], NDArray[Any]]:
        left, right = update.factors()
        start_left, start_right = (as_float32(starts.read(f"{layer}.{end}")) for end in ("lora_A", "lora_B"))
        factor = np.float32(rule.factor_of(layer))
        return np.concatenate([left, -factor * start_left], axis=1), np.concatenate([right, start_right])

    return replace(update, factors=factors)


def pissa_update(update: AnyUpdate, rank: int, weight: Callable[[], NDArray[Any]]) -> Update:
    """The update of a base that has not been changed: A and B as trained, less what they started from.

    PiSSA starts with A @ B = the part of W along its `rank` leading singular vectors and trains beside
    W - A @ B. That part is worked out again, to a relative error of `leading_vectors.TOLERANCE`.

    Args:
        update: A @ B as trained.
        rank: Rank of the adapter.
        weight: Reads W [in, out].
    """
    assert isinstance(update, Update)

    def factors() -> tuple[NDArray[Any], NDArray[Any]]:
        left, right = update.factors()
        start_left, start_right = leading_part(weight(), rank)
        return np.concatenate([left, -start_left], axis=1), np.concatenate([right, start_right])

    return Update(update.shape, factors, update.path)


def leading_part(weight: NDArray[Any], rank: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two factors [in, rank], [rank, out] of the best approximation of that rank; float32."""
    left, sizes, right = leading_vectors(weight, rank)
    return left * sizes, right


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    path = folder / LORA_CONFIG
    if config.get("use_mora"):
        raise UserError(
            f"{path} has use_mora true: MoRA's square matrices are no low-rank update and are not merged here. Merge "
            "it with PaddleNLP, or train with use_mora false"
        )
    check_paddle_lora(folder, config)
