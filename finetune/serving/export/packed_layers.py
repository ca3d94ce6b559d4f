"""Linear layers of the exported graph that hold packed weights, and where each of their rows and columns comes from.

The graph joins and reorders what the model holds (`layout`), but packs nothing anew: a matrix of the graph has rows and
columns of the model's packed matrices, in another order. Which ones, two markings of the model tell, whatever its family:
every weight is set to the number of its output, the model is described and laid out as always, and the numbers are read
off; then the same with inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import nn

from finetune.families.decoder_description import DecoderDescription
from finetune.serving.export.layout import pack_layer
from finetune.storage.quantisation.code_tables import four_bit_values
from finetune.storage.quantisation.grouped_matrix import GroupedMatrix, pack_codes
from finetune.storage.quantisation.packed_weights import FourBitMatrix, PackedMatrix
from finetune.storage.quantisation.stored_writing import row_integers

ROLES = ("qkv", "output", "inner", "outer")


@dataclass(frozen=True)
class GraphMatrix:
    """A packed matrix of the graph.

    Attributes:
        codes: Bytes of every row, the first integer in the lowest bits, uint8 [out, bytes].
        bits: Of an integer.
        table: What integers stand for before zero points and scales, float32 [2^bits].
        scales: float32 [out, groups].
        zeros: float32 [out, groups]; None where 0 is in the table.
        order: Where the inputs are found among those that the layer is given, int64 [in]; None: in place.
    """

    codes: NDArray[np.uint8]
    bits: int
    table: NDArray[np.float32]
    scales: NDArray[np.float32]
    zeros: NDArray[np.float32] | None
    order: NDArray[np.int64] | None


def find_matrices(
    description: DecoderDescription, layers: Sequence[Mapping[str, Any]], packed: Mapping[str, PackedMatrix]
) -> list[dict[str, GraphMatrix]]:
    """Role -> packed matrix of every decoder layer; the weights of the model are overwritten.

    Args:
        description: Of the model, whose weights it reads when asked.
        layers: Name -> linear layer, of every decoder layer.
        packed: Name -> its packed weight.
    """
    return [_find_roles(description, number, own, packed) for number, own in enumerate(layers)]


def _find_roles(
    description: DecoderDescription, number: int, own: Mapping[str, Any], packed: Mapping[str, PackedMatrix]
) -> dict[str, GraphMatrix]:
    starts = np.concatenate([[0], np.cumsum([packed[name].shape[0] for name in own])])
    for layer, start in zip(own.values(), starts[:-1], strict=True):
        _mark(layer, np.arange(layer.weight.shape[1])[None] + start)
    outputs = pack_layer(description.layer(number), description.shape, fold=False)
    for layer in own.values():
        _mark(layer, np.arange(layer.weight.shape[0])[:, None])
    inputs = pack_layer(description.layer(number), description.shape, fold=False)
    matrices = [packed[name] for name in own]
    found = {}
    for role in ROLES:
        rows = getattr(outputs, role).weight[0].astype(np.int64)
        columns = getattr(inputs, role).weight[:, 0].astype(np.int64)
        holders = np.searchsorted(starts, rows, side="right") - 1
        used = np.unique(holders)
        sizes = [matrices[holder].shape[0] for holder in used]
        begins = np.concatenate([[0], np.cumsum(sizes)])[np.searchsorted(used, holders)]
        sources = [matrices[holder] for holder in used]
        found[role] = _graph_matrix(sources, rows - starts[holders] + begins, columns)
    return found


def _mark(layer: Any, numbers: NDArray[np.int64]) -> None:
    marked = np.broadcast_to(numbers.astype(np.float32), tuple(layer.weight.shape))
    layer.weight.set_value(paddle.to_tensor(np.ascontiguousarray(marked)))


def _graph_matrix(
    sources: Sequence[PackedMatrix], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> GraphMatrix:
    """Some rows of packed matrices one below the other.

    Args:
        sources: The model's matrices.
        rows: Place of every row among theirs.
        columns: Which of the model's inputs each of the graph's is.
    """
    like, parts = sources[0], [row_integers(source) for source in sources]
    integers = np.concatenate([each for each, _, _ in parts])[rows]
    scales = np.concatenate([each for _, each, _ in parts])[rows]
    zeros = None
    if isinstance(like, FourBitMatrix):
        bits, table = 4, four_bit_values(like.kind)
    else:
        assert isinstance(like, GroupedMatrix)
        bits, table = like.bits, np.arange(2**like.bits, dtype=np.float32)
        zeros = np.concatenate([each for _, _, each in parts if each is not None])[rows]
    is_in_place = np.array_equal(columns, np.arange(columns.size))
    order = None if is_in_place else np.argsort(columns)
    return GraphMatrix(pack_codes(integers, bits), bits, table, scales, zeros, order)


class PackedLinearLayer(nn.Layer):  # type: ignore[misc]
    """x @ W^T + bias, W worked out from its integers each time.

    Args:
        matrix: The packed weight.
        bias: [out], or None.
    """

    def __init__(self, matrix: GraphMatrix, bias: Any):
        super().__init__()
        per_byte = 8 // matrix.bits
        places = np.arange(256)[:, None] >> (np.arange(per_byte) * matrix.bits) & (2**matrix.bits - 1)
        self._shape = [len(matrix.codes), matrix.codes.shape[1] * per_byte]
        self._hold("table", matrix.table[places].astype(np.float32))  # [256, per byte]
        self._hold("codes", matrix.codes)
        self._hold("scales", matrix.scales)
        self._hold("zeros", matrix.zeros)
        self._hold("order", matrix.order)
        self._hold("bias", bias)

    def _hold(self, name: str, array: NDArray[Any] | None) -> None:
        self.register_buffer(name, None if array is None else paddle.to_tensor(np.ascontiguousarray(array)))

    def forward(self, x: Any) -> Any:
        """[..., in] -> [..., out]."""
        rows, columns = self._shape
        groups = self.scales.shape[1]
        values = paddle.gather(self.table, self.codes.flatten().astype("int32"))
        values = values.reshape([rows, groups, columns // groups])
        if self.zeros is not None:
            values = values - self.zeros.unsqueeze(-1)
        weight = (values * self.scales.unsqueeze(-1)).reshape([rows, columns])
        if self.order is not None:
            x = paddle.index_select(x, self.order, axis=-1)
        product = paddle.matmul(x, weight, transpose_y=True)
        return product if self.bias is None else product + self.bias
