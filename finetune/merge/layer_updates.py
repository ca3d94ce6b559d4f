"""The updates of a base's weights that the tensors of an adapter make, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.adapters.projections import Projections
from finetune.adapters.scaling import ScalingRule
from finetune.adapters.update_tensors import LOKR, VERA, Matrices, check_update
from finetune.merge.kronecker_update import KroneckerUpdate
from finetune.merge.row_blocks import AnyUpdate, Update
from finetune.storage.dtypes import as_float32

FindProjections = Callable[[int, int], Projections]


def unknown_inputs(_: str) -> int:
    """Of a base that nobody has opened."""
    return 0


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of all layers of an adapter, and what is known beside them.

    Attributes:
        matrices: Name of a layer -> its tensors.
        rule: Kind, rank and factor of the layers by the same names.
        is_peft: Whether names are peft's, with A as [r, in] and B as [out, r].
        own_name: Gives PaddleNLP's name of a layer.
        num_inputs: Gives the rows of the base's weight of a layer, by PaddleNLP's name; 0 where it has none.
        find_projections: Gives VeRA's shared matrices for the most rows and columns of a weight.
    """

    matrices: Mapping[str, Matrices]
    rule: ScalingRule
    is_peft: bool = False
    own_name: Callable[[str], str] = str
    num_inputs: Callable[[str], int] = unknown_inputs
    find_projections: FindProjections | None = field(default=None, kw_only=True)

    def updates(self) -> tuple[dict[str, AnyUpdate], Projections | None]:
        """PaddleNLP's name of a layer -> update of its weight [in, out]; and VeRA's shared matrices.

        Raises:
            UserError: Tensors are missing, or their shapes are not those of the rank on record.
        """
        shapes = {layer: self._shape(layer) for layer in self.matrices}
        projections = None
        if self.rule.kind == VERA and shapes and self.find_projections:
            largest = (max(shape[axis] for shape in shapes.values()) for axis in range(2))
            projections = self.find_projections(*largest)
        return {
            self.own_name(layer): self._update(layer, shape, projections) for layer, shape in shapes.items()
        }, projections

    def _shape(self, layer: str) -> tuple[int, int]:
        num_in, num_out = check_update(layer, self.matrices[layer], self.rule, turned=self.is_peft)
        return self.num_inputs(self.own_name(layer)) if num_in is None else num_in, num_out

    def _update(self, layer: str, shape: tuple[int, int], projections: Projections | None) -> AnyUpdate:
        found = self.matrices[layer]
        if projections:
            return _vera_update(found, shape, projections)
        if self.rule.kind == LOKR:
            return _lokr_update(found, shape, self.rule.factor_of(layer))
        return _lora_update(found, shape, self.rule.factor_of(layer), turned=self.is_peft)


def _lora_update(found: Matrices, shape: tuple[int, int], factor: float, *, turned: bool) -> Update:
    """A, AB between them where it was trained so, and B; the factor goes to the left one."""
    magnitude = found.tensors.get("magnitude")
    tensors = {name: tensor for name, tensor in found.tensors.items() if name != "magnitude"}

    def factors() -> tuple[NDArray[Any], NDArray[Any]]:
        arrays = {name: as_float32(tensor.load()) for name, tensor in tensors.items()}
        left, right = (arrays[name].T if turned else arrays[name] for name in ("A", "B"))
        return (left @ arrays["AB"] if "AB" in arrays else left) * np.float32(factor), right

    lengths = None if magnitude is None else lambda: as_float32(magnitude.load())
    return Update(shape, factors, found.path, lengths)


def _vera_update(found: Matrices, shape: tuple[int, int], projections: Projections) -> Update:
    """The shared matrices as far as the layer reaches, with its vectors in them."""

    def factors() -> tuple[NDArray[Any], NDArray[Any]]:
        inner, outer = (as_float32(found.tensors[name].load()) for name in ("d", "b"))
        return projections.left[: shape[0]] * inner, projections.right[:, : shape[1]] * outer

    return Update(shape, factors, found.path)


def _lokr_update(found: Matrices, shape: tuple[int, int], factor: float) -> KroneckerUpdate:
    def read(name: str) -> NDArray[Any]:
        names = (name,) if name in found.tensors else (f"{name}_a", f"{name}_b")
        arrays = [as_float32(found.tensors[each].load()) for each in names]
        return arrays[0] if len(arrays) == 1 else arrays[0] @ arrays[1]

    return KroneckerUpdate(shape, lambda: (read("w1") * np.float32(factor), read("w2")), found.path)
