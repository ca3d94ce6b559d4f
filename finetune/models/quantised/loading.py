"""Quantises the linear layers of a model while its tensors are read, one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from finetune.models.parameters import assign, release_pages
from finetune.models.quantised.layers import hold_packed, linear_layers
from finetune.models.quantised.packed_weights import to_device
from finetune.storage.quantisation.packed_weights import pack_matrix

if TYPE_CHECKING:
    from finetune.families.family import Family
    from finetune.storage.quantisation.scheme import QuantisationScheme


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

    def takes(self, name: str, array: NDArray[Any]) -> bool:
        """Whether a tensor is the weight of a linear layer, and has its shape."""
        layer = self._layers.get(name)
        return layer is not None and tuple(array.shape) == tuple(layer.weight.shape)

    def set_weight(self, name: str, array: NDArray[Any]) -> None:
        """Quantises a tensor [in, out], as `Checkpoint.read` gives it, into its layer.

        Raises:
            UserError: It holds numbers that cannot be quantised.
        """
        layer = self._layers[name]
        packed = pack_matrix(array.T, self._scheme, name=name)
        release_pages(array)
        if self._keep_packed:
            hold_packed(layer, to_device(packed, layer.weight.dtype))
        else:
            assign(layer.weight, packed.values().T)
