"""Gives linear layers packed weights while the tensors of a model are read, one by one.

The files hold ordinary weights, which are quantised (`LinearLayerQuantiser`), or packed ones (`StoredLayerLoader`). Under
tensor parallelism every rank takes the whole tensor and keeps its part: the blocks, and with double quantisation the
mean of all scales, are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.families.tensor_splits import find_split
from finetune.models.parameters import assign, release_pages
from finetune.models.quantised.layers import hold_packed, linear_layers
from finetune.models.quantised.packed_weights import to_device
from finetune.storage.quantisation.cutting import cut_matrix
from finetune.storage.quantisation.packed_weights import PackedMatrix, pack_matrix
from finetune.storage.quantisation.stored_tensors import PackedTensor

if TYPE_CHECKING:
    from finetune.families.family import Family
    from finetune.storage.quantisation.scheme import QuantisationScheme
    from finetune.storage.splits import Split

Reader = Callable[[], NDArray[Any]]


class PackedLayerFiller(Protocol):
    """Fills those parameters that become packed weights."""

    def needs_whole(self, name: str) -> bool:
        """Whether a tensor that ranks divide has to be read whole."""

    def fill(self, name: str, read: Reader) -> NDArray[Any] | None:
        """Fills a parameter, or returns what it is to hold, where that is to be set as ordinary weights are."""


class _LayerParts:
    """The linear layers of a model, and how ranks divide their weights."""

    def __init__(self, model: Any, family: Family):
        self.layers = {
            f"{name}.weight": layer for name, layer in linear_layers(model, family.head_module).items()
        }
        self.degree = max(model.config.tensor_parallel_degree, 1)
        self._rank = max(model.config.tensor_parallel_rank, 0)
        self.splits: dict[str, Split] = {}
        if self.degree > 1:
            splits = {
                name: find_split(family, name, model.config, degree=self.degree) for name in self.layers
            }
            self.splits = {name: split for name, split in splits.items() if split}

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Of a weight [in, out] before it is divided."""
        own, split = tuple(self.layers[name].weight.shape), self.splits.get(name)
        return tuple(split.whole_shape(own, self.degree)) if split else own

    def hold(self, name: str, packed: PackedMatrix) -> None:
        """Gives a layer its part of a packed weight."""
        layer = self.layers[name]
        weight = to_device(self.own_part(name, packed), layer.weight.dtype)
        weight.is_distributed = name in self.splits
        hold_packed(layer, weight)

    def own_part(self, name: str, packed: PackedMatrix) -> PackedMatrix:
        """This rank's part."""
        split = self.splits.get(name)
        if split is None:
            return packed
        shape = packed.shape[::-1]
        places = [(columns, rows) for rows, columns in split.places(shape, self.degree, self._rank)]
        return cut_matrix(packed, places, axis=1 - split.axis % 2, name=name)


class StoredLayerLoader:
    """Gives linear layers the packed weights that the files hold.

    Layers that the model joins or takes apart, and the output layer, get the values that those stand for.

    Args:
        model: As it was built, its linear layers not yet filled.
        tensors: Parameter -> packed tensor of the files.
        family: Record of the model: its output layer is never packed.
    """

    def __init__(self, model: Any, tensors: Mapping[str, PackedTensor], family: Family):
        self._parts = _LayerParts(model, family)
        self._tensors = tensors

    def needs_whole(self, name: str) -> bool:
        """Whether a tensor that ranks divide has to be read whole: what is read here is."""
        return False

    def fill(self, name: str, read: Reader) -> NDArray[Any] | None:
        """Gives a layer its packed weight, or reads what is held otherwise.

        Raises:
            UserError: The tensors of a layer do not fit together.
        """
        tensor = self._tensors.get(name)
        is_held = tensor is not None and name in self._parts.layers
        if tensor is None or not is_held or tensor.matrix_shape[::-1] != self._parts.whole_shape(name):
            return read()
        self._parts.hold(name, tensor.read_packed())
        for part in tensor.stored.values():
            release_pages(part.read())
        return None


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
        self._parts = _LayerParts(model, family)

    def needs_whole(self, name: str) -> bool:
        """Whether a tensor that ranks divide has to be read whole."""
        return name in self._parts.splits

    def fill(self, name: str, read: Reader) -> NDArray[Any] | None:
        """Quantises a tensor [in, out], as `Checkpoint.read` gives it, into its layer; another one is handed back.

        Raises:
            UserError: It holds numbers that cannot be quantised, or cannot be divided over the ranks, or the layer was
                joined from parts that were already divided.
        """
        array = read()
        if not self._takes(name, array):
            return array
        packed = pack_matrix(array.T, self._scheme, name=name)
        release_pages(array)
        if self._keep_packed:
            self._parts.hold(name, packed)
        else:
            assign(self._parts.layers[name].weight, self._parts.own_part(name, packed).values().T)
        return None

    def _takes(self, name: str, array: NDArray[Any]) -> bool:
        """Whether a tensor [in, out] is the weight of a linear layer, and has its shape."""
        layer = self._parts.layers.get(name)
        if layer is None:
            return False
        if name in self._parts.splits and tuple(array.shape) == tuple(layer.weight.shape):
            raise UserError(
                f"{name} is joined from parts after these are divided over {self._parts.degree} ranks, and would be "
                "quantised otherwise than in one process: set fuse_attention_qkv and fuse_attention_ffn to false"
            )
        return tuple(array.shape) == self._parts.whole_shape(name)
