"""Matrices from the tensors of others: every layout, bits and groups; what cannot be told apart or fits nothing is named."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune.errors import UserError
from finetune.storage.checkpoints import TensorFiles
from finetune.storage.dtypes import dtype_name
from finetune.storage.quantisation.cutting import cut_matrix
from finetune.storage.quantisation.grouped_matrix import pack_codes, unpack_codes
from finetune.storage.quantisation.stored_format import stored_format
from finetune.storage.quantisation.stored_tensors import with_packed
from finetune.storage.writer import ComputedTensor, Layout, write_tensors
from tests.quantised_folders import (
    awq_layer,
    bitsandbytes_layer,
    compressed_layer,
    gptq_layer,
    pack_columns,
    paddlenlp_layer,
)
from tests.storage.quantisation.formats import AWQ, BNB4, BNB8, GPTQ, PADDLE, PADDLE_ONLY, compressed

WEIGHT = (np.random.default_rng(0).standard_normal((256, 48)) * 0.05).astype(np.float32)  # [in, out]


def open_layer(path, parts, facts):
    """The tensor of a folder with one layer."""
    save_file({f"layer.{end}": np.ascontiguousarray(part) for end, part in parts.items()}, path)
    form = stored_format({"quantization_config": facts}, "folder")
    return with_packed(TensorFiles([path]).tensors, form, "folder")["layer.weight"]


def check(path, made, facts, *, turned: bool = True):
    parts, values = made
    tensor = open_layer(path, parts, facts)
    expected = values.T if turned else values
    assert tensor.shape == expected.shape
    assert tensor.dtype == values.dtype
    np.testing.assert_array_equal(tensor.load(), expected)
    packed = tensor.read_packed()
    np.testing.assert_array_equal(packed.values(), values.T.astype(np.float32))
    return packed


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [-1, 32, 64, 128])
@pytest.mark.parametrize(
    ("version", "order", "symmetric"),
    [(1, False, True), (1, True, False), (2, True, True), (2, False, False)],
)
def test_gptq(tmp_path, bits, size, version, order, symmetric):
    facts = GPTQ | {
        "bits": bits,
        "group_size": size,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    made = gptq_layer(WEIGHT, bits, size, version=version, act_order=order, symmetric=symmetric)
    packed = check(tmp_path / "a.safetensors", made, facts)
    assert packed.codes.nbytes == WEIGHT.size * bits // 8


def test_gptq_without_an_order_and_with_a_short_last_group(tmp_path):
    weight = np.concatenate([WEIGHT, WEIGHT[:32]])
    parts, values = gptq_layer(weight, 4, 64)
    del parts["g_idx"]
    check(tmp_path / "a.safetensors", (parts, values), GPTQ | {"group_size": 64})


def test_layers_of_one_gptq_model_may_have_other_bits(tmp_path):
    check(tmp_path / "a.safetensors", gptq_layer(WEIGHT, 8, 32), GPTQ)


@pytest.mark.parametrize("size", [-1, 32, 64, 128])
def test_awq(tmp_path, size):
    check(tmp_path / "a.safetensors", awq_layer(WEIGHT, size), AWQ | {"group_size": size})


@pytest.mark.parametrize(
    ("bits", "form"), [(4, "pack-quantized"), (8, "pack-quantized"), (8, "int-quantized")]
)
@pytest.mark.parametrize("size", [-1, 32, 128])
@pytest.mark.parametrize(("symmetric", "order"), [(True, False), (False, False), (False, True)])
def test_compressed_tensors(tmp_path, bits, form, size, symmetric, order):
    made = compressed_layer(
        WEIGHT, bits, size, packed=form == "pack-quantized", symmetric=symmetric, act_order=order
    )
    facts = compressed(bits, size, form, symmetric=symmetric, actorder="group" if order else None)
    check(tmp_path / "a.safetensors", made, facts)


def test_compressed_tensors_of_widths_that_fill_no_word(tmp_path):
    check(tmp_path / "a.safetensors", compressed_layer(WEIGHT[:99, :37], 4, -1), compressed(4, -1))


def test_paddlenlp(tmp_path):
    check(tmp_path / "a.safetensors", paddlenlp_layer(WEIGHT), PADDLE, turned=False)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes(tmp_path, kind, double):
    made = bitsandbytes_layer(WEIGHT, kind, double=double)
    check(tmp_path / "a.safetensors", made, BNB4)


def test_bitsandbytes_in_another_storage_and_with_another_table(tmp_path):
    parts, values = bitsandbytes_layer(WEIGHT, "nf4", double=True)
    parts["weight"] = parts["weight"].reshape(-1).view(np.float32)[:, None]
    check(tmp_path / "a.safetensors", (parts, values), BNB4)
    table = parts["weight.nested_quant_map"] = parts["weight.nested_quant_map"] * np.float32(0.5)
    found = open_layer(tmp_path / "b.safetensors", parts, BNB4).read_packed().scale_values()
    scales = table[parts["weight.absmax"]] * np.repeat(parts["weight.nested_absmax"], 256)[: found.size]
    np.testing.assert_allclose(found, scales + (found - scales).mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("axis", "parts"), [(0, (slice(0, 24), slice(24, 48))), (1, (slice(0, 80), slice(80, 256)))]
)
@pytest.mark.parametrize("order", [False, True])
def test_a_part_stands_for_the_same_values(tmp_path, axis, parts, order):
    made, values = gptq_layer(WEIGHT, 4, 64, act_order=order)
    packed = open_layer(tmp_path / "a.safetensors", made, GPTQ | {"group_size": 64}).read_packed()
    everything = slice(0, packed.shape[1 - axis])
    for part in parts:
        place = (part, everything) if axis == 0 else (everything, part)
        found = cut_matrix(packed, [place], axis=axis, name="layer").values()
        np.testing.assert_array_equal(found, values.T[place].astype(np.float32))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_survive_packing(bits):
    codes = np.random.default_rng(1).integers(0, 2**bits, (5, 37)).astype(np.uint8)
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, bits), bits, 37), codes)


def test_ambiguous_zero_points_are_refused_with_their_numbers(tmp_path):
    parts, _ = gptq_layer(WEIGHT, 4, 64)
    zeros = np.full((4, 48), 7)
    zeros[2, 5], zeros[3, 1] = 15, 15
    parts["qzeros"] = pack_columns(zeros, 4)
    with pytest.raises(
        UserError, match=r"2 of 192 zero points are stored as 15 \(the first in group 2 of output 5\)"
    ):
        open_layer(tmp_path / "a.safetensors", parts, GPTQ | {"group_size": 64}).load()
    facts = GPTQ | {"group_size": 64, "checkpoint_format": "gptq_v2"}
    assert open_layer(tmp_path / "b.safetensors", parts, facts).load().shape == (48, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qzeros": None}, "layer is quantised .* but its files lack the layer's qzeros"),
        ({"scales": np.zeros((4, 47), np.float16)}, r"scales is \[4, 47\], where \[4, 48\] fits"),
        ({"scales": np.zeros((4, 48), np.int16)}, "scales has element type int16"),
        ({"g_idx": np.full(256, 9, np.int32)}, "columns are in groups 9 to 9, the file has 4"),
        ({"g_idx": np.zeros(77, np.int32)}, "make 13 bits"),
        ({"g_idx": None, "qzeros": np.zeros((8, 6), np.int32), "scales": np.zeros((8, 48), np.float16)},
         "in groups of 64 have 4 scales, the file 8"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_together_are_named(tmp_path, change, message):
    parts, _ = gptq_layer(WEIGHT, 4, 64)
    parts = {end: part for end, part in (parts | change).items() if part is not None}
    with pytest.raises(UserError, match=message):
        open_layer(tmp_path / "a.safetensors", parts, GPTQ | {"group_size": 64}).load()


@pytest.mark.parametrize(
    ("end", "value", "message"),
    [
        ("weight", np.zeros((7, 1), np.uint8), r"7 bytes hold no matrix of \[48, 256\]"),
        ("weight.absmax", np.zeros(5, np.float32), "5 scales for 12288 weights in blocks of 64"),
        ("weight.quant_map", np.zeros(16, np.float32), "a table of values that is not that of nf4"),
        ("weight.quant_state.bitsandbytes__nf4", np.zeros(4, np.uint8), "cannot be read"),
    ],
)
def test_damaged_files_of_bitsandbytes_are_named(tmp_path, end, value, message):
    parts, _ = bitsandbytes_layer(WEIGHT, "nf4")
    with pytest.raises(UserError, match=message):
        open_layer(tmp_path / "a.safetensors", parts | {end: value}, BNB4).load()


def test_a_layer_of_other_bits_without_an_order_is_read_by_the_exceptions(tmp_path):
    parts, values = gptq_layer(WEIGHT, 8, 64, symmetric=True)
    del parts["g_idx"]
    facts = GPTQ | {"dynamic": {"+:lay.*": {"bits": 8, "group_size": 64, "sym": True}}}
    check(tmp_path / "a.safetensors", (parts, values), facts)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scales_of_other_types(tmp_path, dtype):
    parts, values = gptq_layer(WEIGHT, 4, 64)
    scales = parts["scales"].astype(np.float32)
    bits = scales.view(np.uint32) & np.uint32(0xFFFF0000) if dtype == "bfloat16" else scales.view(np.uint32)
    exact = bits.view(np.float32)
    integers = np.rint(values.astype(np.float32) / scales[parts["g_idx"]])
    parts["scales"] = (bits >> np.uint32(16)).astype(np.uint16) if dtype == "bfloat16" else exact
    made = [
        ComputedTensor(f"layer.{end}", part.dtype, part.shape, lambda part=part: iter([part]))
        for end, part in parts.items()
    ]
    write_tensors(tmp_path, made, Layout(format="pt"))
    form = stored_format({"quantization_config": GPTQ | {"group_size": 64}}, "folder")
    tensor = with_packed(TensorFiles([tmp_path / "model.safetensors"]).tensors, form, "folder")[
        "layer.weight"
    ]
    assert dtype_name(tensor.dtype) == dtype
    found = tensor.read_packed().values()
    np.testing.assert_allclose(
        found, (integers * exact[parts["g_idx"]]).T, rtol=2**-8 if dtype == "bfloat16" else 0
    )


@pytest.mark.parametrize("arch", [70, 75, 80, 90])
def test_paddlenlps_order_of_a_gpu_is_found(tmp_path, arch):
    import paddle
    from paddle.nn.quant import weight_quantize

    made, scales = weight_quantize(
        paddle.to_tensor(WEIGHT.astype(np.float16)), algo="weight_only_int8", arch=arch
    )
    half = scales.numpy().astype(np.float32)
    integers = np.clip(np.rint(WEIGHT.astype(np.float16).astype(np.float32) / half), -127, 127)
    parts = {"quant_weight": made.numpy(), "quant_scale": scales.numpy()}
    values = (integers * half).astype(np.float16)
    check(tmp_path / "a.safetensors", (parts, values), PADDLE_ONLY, turned=False)


def test_a_layer_of_paddlenlp_without_scales_is_zero(tmp_path):
    parts = {"quant_weight": np.zeros((48, 256), np.int8), "quant_scale": np.zeros(48, np.float16)}
    assert not open_layer(tmp_path / "a.safetensors", parts, PADDLE_ONLY).load().any()


def test_paddlenlps_bytes_in_no_order_that_is_known_are_refused(tmp_path):
    integers = np.random.default_rng(2).integers(-100, 100, (48, 256)).astype(np.int8)
    parts = {"quant_weight": integers ^ np.int8(-128), "quant_scale": np.ones(48, np.float16)}
    with pytest.raises(UserError, match="of sm75 to sm90, sm70 here fits none"):
        open_layer(tmp_path / "a.safetensors", parts, PADDLE_ONLY).load()
    parts["quant_weight"] = np.full((48, 256), 127 ^ -128, np.int8)
    with pytest.raises(UserError, match="fits sm75 to sm90 and sm70"):
        open_layer(tmp_path / "b.safetensors", parts, PADDLE_ONLY).load()


@pytest.mark.parametrize(
    ("made", "facts", "message"),
    [
        (gptq_layer(WEIGHT, 4, 64, act_order=True), GPTQ | {"group_size": 64, "desc_act": True},
         "by an order .* but the file has no g_idx"),
        (gptq_layer(WEIGHT, 4, 64), GPTQ | {"group_size": 64, "sym": True}, "zero points are not 8 .* sym is true"),
        (awq_layer(WEIGHT, 64), AWQ | {"group_size": 64, "zero_point": False}, "zero_point is false in config.json"),
        (compressed_layer(WEIGHT, 4, 64, symmetric=False), compressed(4, 64, symmetric=True), "symmetric is true"),
        (compressed_layer(WEIGHT, 4, 64), compressed(4, 64, symmetric=False), "there is no weight_zero_point"),
        (compressed_layer(WEIGHT, 4, 64, act_order=True), compressed(4, 64, actorder="group"), "has no g_idx"),
    ],
)  # fmt: skip
def test_what_contradicts_its_configuration_is_refused(tmp_path, made, facts, message):
    parts = {end: part for end, part in made[0].items() if "g_idx" not in end}
    with pytest.raises(UserError, match=message):
        open_layer(tmp_path / "a.safetensors", parts, facts).load()


@pytest.mark.parametrize(
    ("parts", "facts", "message"),
    [
        ({"qweight": np.zeros((24, 48), np.int32), "qzeros": np.zeros((1, 5), np.int32), "scales": np.ones((1, 48), np.float16),
          "g_idx": np.zeros(256, np.int32)}, GPTQ, "has integers of 3 bits, where 2, 4, 8 are read"),
        (awq_layer(WEIGHT, 64)[0] | {"qzeros": np.zeros((4, 6), np.int32)}, AWQ | {"group_size": 64, "zero_point": False},
         "192 of 192 zero points are not 8"),
        (bitsandbytes_layer(WEIGHT, "llm.int8")[0] | {"weight_format": np.array([2], np.uint8)}, BNB8,
         "in tiles for one kind of GPU"),
        (gptq_layer(WEIGHT, 4, 64)[0] | {"scales": np.full((4, 48), np.inf, np.float16)}, GPTQ | {"group_size": 64},
         "scales has values that are no numbers"),
    ],
)  # fmt: skip
def test_what_has_another_meaning_than_its_name_is_refused(tmp_path, parts, facts, message):
    with pytest.raises(UserError, match=message):
        open_layer(tmp_path / "a.safetensors", parts, facts).load()


def test_zero_points_that_are_all_zero_count_as_they_are_stored(tmp_path):
    parts, _ = awq_layer(WEIGHT, 64)
    parts["qzeros"] = np.zeros_like(parts["qzeros"])
    assert open_layer(tmp_path / "a.safetensors", parts, AWQ | {"group_size": 64}).load().min() == 0


def test_rows_of_bitsandbytes_may_say_so(tmp_path):
    parts, values = bitsandbytes_layer(WEIGHT, "llm.int8")
    check(tmp_path / "a.safetensors", (parts | {"weight_format": np.zeros(1, np.uint8)}, values), BNB8)


def test_ordinary_weights_under_a_quantised_configuration_are_named(tmp_path):
    with pytest.raises(UserError, match="if they are ordinary weights, remove quantization_config"):
        open_layer(tmp_path / "a.safetensors", {"weight": WEIGHT}, GPTQ)
