"""Quantises the linear layers of a model while its tensors are read, one by one.

Under tensor parallelism every rank quantises the whole tensor and keeps its part: the blocks, and with double
quantisation the mean of all scales, are those of one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.families.tensor_splits import find_split
from finetune.models.parameters import assign, release_pages
from finetune.models.quantised.layers import hold_packed, linear_layers
from finetune.models.quantised.packed_weights import to_device
from finetune.storage.quantisation.cutting import cut_matrix
from finetune.storage.quantisation.packed_weights import PackedMatrix, pack_matrix

if TYPE_CHECKING:
    from finetune.families.family import Family
    from finetune.storage.quantisation.scheme import QuantisationScheme
    from finetune.storage.splits import Split


class LinearLayerQuantiser:
    """Gives linear layers packed weights, or the values that those stand for.

    What the model holds as one matrix is quantised as one: a joined query, key and value projection has other blocks
    than the three alone, where their sizes are no multiples of a block.

    Args:
        model: As it was built, its linear layers not yet filled.
        scheme: How to quantise.
        family: Record of the model: its output layer stays as it is.
        keep_packed: Whether the layers hold the packed weights.
    """

    def __init__(self, model: Any, scheme: QuantisationScheme, family: Family, *, keep_packed: bool):
        self._scheme, self._keep_packed = scheme, keep_packed
        self._layers = {
            f"{name}.weight": layer for name, layer in linear_layers(model, family.head_module).items()
        }
        self._degree = max(model.config.tensor_parallel_degree, 1)
        self._rank = max(model.config.tensor_parallel_rank, 0)
        self._splits: dict[str, Split] = {}
        if self._degree > 1:
            splits = {
                name: find_split(family, name, model.config, degree=self._degree) for name in self._layers
            }
            self._splits = {name: split for name, split in splits.items() if split}

    def needs_whole(self, name: str) -> bool:
        """Whether a tensor that ranks divide has to be read whole."""
        return name in self._splits

    def takes(self, name: str, array: NDArray[Any]) -> bool:
        """Whether a tensor [in, out] is the weight of a linear layer, and has its shape.

        Raises:
            UserError: The layer was joined from parts that were already divided over ranks.
        """
        layer = self._layers.get(name)
        if layer is None:
            return False
        own, split = tuple(layer.weight.shape), self._splits.get(name)
        if split is None:
            return tuple(array.shape) == own
        if tuple(array.shape) == own:
            raise UserError(
                f"{name} is joined from parts after these are divided over {self._degree} ranks, and would be "
                "quantised otherwise than in one process: set fuse_attention_qkv and fuse_attention_ffn to false"
            )
        return tuple(array.shape) == tuple(split.whole_shape(own, self._degree))

    def set_weight(self, name: str, array: NDArray[Any]) -> None:
        """Quantises a tensor [in, out], as `Checkpoint.read` gives it, into its layer.

        Raises:
            UserError: It holds numbers that cannot be quantised, or cannot be divided over the ranks.
        """
        layer = self._layers[name]
        packed = self._own_part(name, pack_matrix(array.T, self._scheme, name=name), array.shape)
        release_pages(array)
        if self._keep_packed:
            weight = to_device(packed, layer.weight.dtype)
            weight.is_distributed = name in self._splits
            hold_packed(layer, weight)
        else:
            assign(layer.weight, packed.values().T)

    def _own_part(self, name: str, packed: PackedMatrix, shape: tuple[int, ...]) -> PackedMatrix:
        split = self._splits.get(name)
        if split is None:
            return packed
        places = [(columns, rows) for rows, columns in split.places(shape, self._degree, self._rank)]
        return cut_matrix(packed, places, axis=1 - split.axis % 2, name=name)
