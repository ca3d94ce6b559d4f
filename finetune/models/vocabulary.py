"""A tokenizer with more tokens than the model has embeddings: Chinese tokens added to a Llama, for instance.

The model is built with one row per token; what the files hold fills the first rows, and each new row is the
mean of them (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021): no new token
then outweighs the known ones before it is trained. There is no noise on it. New rows part by themselves,
because each meets other gradients, and without noise every load gives the same rows, so that an adapter
trained above them fits the same base again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.families.family import Family
from finetune.models.parameters import assign, mean_along
from finetune.storage.dtypes import as_float32
from finetune.storage.splits import Split

Reader = Callable[[], NDArray[Any]]


@dataclass(frozen=True)
class VocabularyGrowth:
    """From how many rows to how many, and of which layers.

    Attributes:
        old: Rows in the weight files.
        new: Rows of the model, one per token of the tokenizer.
        modules: Last parts of the names of the layers with a row per token.
    """

    old: int
    new: int
    modules: tuple[str, ...]

    def covers(self, name: str) -> bool:
        """Whether a parameter belongs to a layer that grows."""
        return name.rpartition(".")[0].rpartition(".")[2] in self.modules

    def fits(self, array: NDArray[Any], shape: tuple[int, ...]) -> bool:
        """Whether a stored tensor and a parameter of that shape differ by the new rows only."""
        return [pair for pair in zip(array.shape, shape, strict=False) if pair[0] != pair[1]] == [
            (self.old, self.new)
        ] and array.ndim == len(shape)


def find_growth(
    vocab_size: int | None, num_tokens: int, *, family: Family, other_tokenizer: bool
) -> VocabularyGrowth | None:
    """What has to grow for a tokenizer; None when the model has a row for every token.

    Args:
        vocab_size: Rows of the model's embeddings, None when its configuration does not say.
        num_tokens: Tokens of the tokenizer, added ones included.
        family: Record of the model.
        other_tokenizer: Whether the user named a tokenizer that is not the model's own.

    Raises:
        UserError: The model's own tokenizer has too many tokens, so they do not belong together.
    """
    if vocab_size is None or num_tokens <= vocab_size:
        return None
    if not other_tokenizer:
        raise UserError(
            f"the tokenizer has {num_tokens} tokens but the model only {vocab_size} embeddings: "
            "use the tokenizer that belongs to the model, or name another one with --tokenizer_name_or_path "
            "to give the model embeddings for its tokens."
        )
    return VocabularyGrowth(vocab_size, num_tokens, (family.embedding_module, family.head_module))


def is_other_tokenizer(tokenizer: str | Path | None, model: str | Path) -> bool:
    """Whether a tokenizer was named that does not lie in the model's own folder."""
    return tokenizer is not None and Path(tokenizer).resolve() != Path(model).resolve()


def describe(growth: VocabularyGrowth, *, untrained: bool) -> list[str]:
    """Lines for the person who started the run.

    Args:
        growth: What happens.
        untrained: Whether the method leaves the new rows as they are.
    """
    lines = [
        f"Vocabulary: {growth.old} embeddings grow to {growth.new}, one per token of the tokenizer; new rows "
        "start as the mean of the others"
    ]
    if untrained:
        embedding, head = growth.modules
        lines.append(
            "warning: the embeddings of new tokens stay untrained with this method: use LoRA with "
            f"--modules_to_save {embedding},{head}, or train all weights"
        )
    return lines


def assign_grown(parameter: Any, array: NDArray[Any]) -> None:
    """Sets a parameter from a stored tensor with fewer rows; the mean of those fills the rest."""
    import paddle

    axis = next(index for index, size in enumerate(array.shape) if size != parameter.shape[index])
    assign(parameter, array)
    mean = paddle.to_tensor(mean_along(array, axis)).cast(parameter.dtype)  # size 1 along the axis of tokens
    place = (slice(None),) * axis + (slice(array.shape[axis], None),)
    with paddle.no_grad():
        parameter[place] = mean


def grown_part_reader(
    read: Reader, growth: VocabularyGrowth, split: Split, *, degree: int, rank: int
) -> Reader:
    """Reads one rank's part of a tensor with its new rows, as float32.

    Args:
        read: Gives the stored tensor, without new rows.
        growth: How many there are to be.
        split: How the tensor with its new rows is divided over the ranks; in one block.
        degree: Number of ranks.
        rank: Which part.
    """

    def read_grown() -> NDArray[Any]:
        array = read()
        axes = [index for index, size in enumerate(array.shape) if size == growth.old]
        if len(axes) != 1:
            return split.part(array, degree, rank)
        axis = axes[0]
        sizes = tuple(growth.new if index == axis else size for index, size in enumerate(array.shape))
        (place,) = split.places(sizes, degree, rank)
        known = as_float32(array[place])
        missing = split.part_shape(sizes, degree)[axis] - known.shape[axis]
        if not missing:
            return known
        rows = np.repeat(mean_along(array, axis), missing, axis=axis)  # `missing` along the axis of tokens
        return np.concatenate([known, rows], axis=axis)

    return read_grown
