"""Keyed dropout: masks that follow samples and layers, and nothing of how they are computed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.nn import functional as F
from scipy import stats

from finetune.adapters.lora import add_lora
from finetune.machine.randomness.dropout import KeyedDropout, has_dropout, keep_mask
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny
from finetune.training.loss import logits_of
from tests.families.decoding import packed, random_rows

P = 0.25


class Layers(nn.Layer):
    """Dropouts of each kind, by the names that models give them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.attention_dropout = nn.Dropout(P), nn.Dropout(P), nn.Dropout(P)

    def forward(self, x):
        return self.first(x), self.second(x), F.dropout(x, P), F.dropout(x, P)


@pytest.fixture(scope="module")
def layers():
    return Layers()


def masks(layers, shape, segments, step=0, seed=1, call=None, **layout) -> list[np.ndarray]:
    """What the dropouts keep of ones."""
    keyed = KeyedDropout(layers, seed=seed, **layout)
    layers.train()
    with keyed.active(step, segments):
        found = (call or layers)(paddle.ones(shape))
    return [part.numpy() for part in (found if isinstance(found, tuple) else (found,))]


def kept_bits(layers, **key) -> np.ndarray:
    """[samples, positions, channels] of the first dropout, as 0 and 1."""
    return (masks(layers, [16, 64, 64], [[(64, i)] for i in range(16)], **key)[0] > 0).astype(int)


def test_both_ways_of_hashing_give_the_same_mask():
    random = np.random.default_rng(0)
    rows = random.integers(0, 2**32, [3, 70], dtype=np.uint32)
    columns = random.integers(0, 2**32, [3, 1100], dtype=np.uint32)
    host = keep_mask(rows, columns, P, on_host=True).numpy()
    np.testing.assert_array_equal(host, keep_mask(rows, columns, P, on_host=False).numpy())
    bits = (rows[:, :, None] ^ columns[:, None, :]).astype(object)  # Python's integers do not wrap around
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) % 2**32
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) % 2**32
    signed = np.where(bits >= 2**31, bits - 2**32, bits)
    np.testing.assert_array_equal(host, (signed >= -(2**31) + P * 2**32).astype(bool))


@pytest.mark.parametrize("p", [0.0001, 0.1, 0.5, 0.9])
def test_share_of_dropped_elements(p):
    random = np.random.default_rng(1)
    rows, columns = (random.integers(0, 2**32, [1, 1000], dtype=np.uint32) for _ in range(2))
    dropped = 1 - keep_mask(rows, columns, p, on_host=True).numpy().mean()
    assert abs(dropped - p) < 4.5 * (p * (1 - p) / 1e6) ** 0.5


def test_what_stays_is_scaled_and_so_is_its_gradient(layers):
    x = paddle.randn([2, 8, 16])
    x.stop_gradient = False
    keyed = KeyedDropout(layers, seed=1)
    with keyed.active(0, [[(8, 0)], [(8, 1)]]):
        out = layers(x)[0]
    out.sum().backward()
    kept = out.numpy() != 0
    np.testing.assert_allclose(out.numpy()[kept], x.numpy()[kept] / (1 - P), rtol=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), kept / (1 - P), rtol=1e-6)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,)], ids=["samples", "positions", "channels"])
def test_neighbours_are_independent(layers, axes):
    """All 2^8 patterns of eight neighbours along an axis are as frequent as independent draws make them."""
    bits = np.moveaxis(kept_bits(layers), axes[0], -1).reshape(-1, 8)
    counts = np.bincount(bits @ (1 << np.arange(8)), minlength=256)
    ones = np.array([bin(pattern).count("1") for pattern in range(256)])
    expected = len(bits) * (1 - P) ** ones * P ** (8 - ones)
    often = expected >= 5
    counts, expected = counts[often], expected[often]
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-4


def test_layers_calls_steps_and_seeds_are_independent(layers):
    shape, segments = [8, 64, 128], [[(64, i)] for i in range(8)]
    drawn = masks(layers, shape, segments)
    drawn += masks(layers, shape, segments, step=1)[:1] + masks(layers, shape, segments, seed=2)[:1]
    correlation = np.corrcoef([part.ravel() > 0 for part in drawn])
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 4.5 / np.prod(shape) ** 0.5


def test_mask_follows_the_sample_in_any_company(layers):
    alone = masks(layers, [1, 6, 16], [[(6, 12)]])
    padded = masks(layers, [2, 9, 16], [[(9, 11)], [(6, 12)]])
    in_row = masks(layers, [1, 20, 16], [[(4, 7), (6, 12), (3, 9)]])
    length_first = masks(layers, [9, 2, 16], [[(9, 11)], [(6, 12)]], length_first=True)
    for one, two, three, four in zip(alone, padded, in_row, length_first, strict=True):
        np.testing.assert_array_equal(one[0], two[1, :6])
        np.testing.assert_array_equal(one[0], three[0, 4:10])
        np.testing.assert_array_equal(one[0], four[:6, 1])


@pytest.mark.parametrize("length_first", [False, True])
def test_sequence_parallel_ranks_get_their_rows(layers, length_first):
    segments = [[(6, 1)], [(4, 2)]]
    whole_shape = [6, 2, 16] if length_first else [2, 6, 16]
    whole = masks(layers, whole_shape, segments, length_first=length_first)[0].reshape([12, 16])
    layout = {"length_first": length_first, "tensor_degree": 2}
    parts = [masks(layers, [6, 16], segments, tensor_rank=rank, **layout)[0] for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_rows_that_sequence_parallel_ranks_gathered_keep_their_mask():
    holder = row_parallel_holder()
    call, segments = holder.dense.lora_dropout, [[(6, 1)], [(4, 2)]]
    whole = masks(holder, [2, 6, 16], segments, call=call, tensor_degree=2, tensor_rank=1)[0]
    flat = masks(holder, [12, 16], segments, call=call, tensor_degree=2, tensor_rank=1)[0]
    np.testing.assert_array_equal(flat, whole.reshape([12, 16]))


def row_parallel_holder() -> nn.Layer:
    """A layer with a dropout that sees a slice of the channels."""
    holder = nn.Layer()
    holder.dense = nn.Layer()
    holder.dense.input_size_per_partition = 16  # as RowParallelLinear has it
    holder.dense.lora_dropout = nn.Dropout(P)
    return holder


def test_slices_of_channels_get_their_part_of_the_mask():
    holder = row_parallel_holder()
    call = holder.dense.lora_dropout
    whole = masks(holder, [2, 6, 32], [[(6, 1)], [(6, 2)]], call=call)[0]
    parts = [
        masks(holder, [2, 6, 16], [[(6, 1)], [(6, 2)]], call=call, tensor_degree=2, tensor_rank=rank)[0]
        for rank in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=2), whole)


def test_attention_probabilities_follow_query_key_and_head(layers):
    call = layers.attention_dropout
    segments = [[(5, 1)], [(3, 2)]]
    whole = masks(layers, [2, 4, 5, 5], segments, call=call)[0]
    halves = [
        masks(layers, [2, 2, 5, 5], segments, call=call, tensor_degree=2, tensor_rank=rank)[0]
        for rank in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole)
    folded = masks(layers, [8, 5, 5], segments, call=call)[0]
    np.testing.assert_array_equal(folded.reshape(whole.shape), whole)
    in_row = masks(layers, [1, 4, 8, 8], [[(5, 1), (3, 2)]], call=call)[0]
    np.testing.assert_array_equal(in_row[0, :, 5:, 5:], whole[1, :, :3, :3])
    behind_prefix = masks(layers, [2, 4, 5, 8], segments, call=call)[0]
    np.testing.assert_array_equal(behind_prefix[..., 3:], whole)
    prefix_in_row = masks(layers, [1, 4, 8, 11], [[(5, 1), (3, 2)]], call=call)[0]
    np.testing.assert_array_equal(prefix_in_row[0, :, 5:, :3], behind_prefix[1, :, :3, :3])
    large = masks(layers, [1, 4, 64, 64], [[(64, 0)]], call=call)[0][0]
    heads = np.corrcoef([part.ravel() > 0 for part in large])
    np.fill_diagonal(heads, 0)
    assert np.abs(heads).max() < 4.5 / 64


def test_a_tensor_that_is_no_part_of_the_batch_is_an_error(layers):
    with pytest.raises(RuntimeError, match=r"layer 'first' got a tensor of shape \[5, 16\]"):
        masks(layers, [5, 16], [[(6, 1)], [(4, 2)]])
    assert masks(layers, [1, 6, 16], [[(6, 1)]])[0].shape == (1, 6, 16)  # and the next batch is sound


def test_paddles_own_dropout_runs_outside_and_in_evaluation(layers):
    original = F.dropout
    keyed = KeyedDropout(layers, seed=1)
    with keyed.active(0, [[(6, 0)]]):
        assert F.dropout != original
        layers.eval()
        assert (layers.first(paddle.ones([1, 6, 16])).numpy() == 1).all()
        layers.train()
    assert F.dropout is original
    assert not has_dropout(nn.Linear(2, 2))


# ------------------------------------------------------------------- the families

SETTINGS = {
    "llama": {},
    "qwen2": {"attention_dropout": P},
    "gemma": {"attention_dropout": P},
    "mistral": {},
    "chatglm2": {"attention_dropout": P, "hidden_dropout": P},
    "qwen": {"attn_dropout_prob": P, "emb_dropout_prob": P},
    "bloom": {"attention_dropout": P, "hidden_dropout": P},
    "opt": {"hidden_dropout_prob": P, "attention_probs_dropout_prob": P},
}
LENGTHS = (9, 5, 7)


@pytest.fixture(scope="module", params=sorted(SETTINGS))
def family_model(request, tmp_path_factory):
    """A family's tiny model with every dropout that it has, and LoRA's."""
    name = request.param
    folder = tmp_path_factory.mktemp("dropout") / name
    build_tiny(name, folder, vocab_size=500, num_layers=2, num_heads=4, hidden_size=32)
    resolved = resolve_model(folder)
    overrides = {"use_cache": False, **SETTINGS[name]}
    model = load_model(resolved, dtype="float32", config_overrides=overrides)
    settings = SimpleNamespace(
        lora_target_modules=None, lora_rank=2, lora_alpha=4, lora_dropout=P, rslora=False,
        lora_plus_scale=1.0, pissa=False, model_name_or_path="tiny", modules_to_save=None,
        use_dora=False, lora_use_mixer=False, rank_pattern=None, alpha_pattern=None, lora_bias="none", lora_dtype=None,
        init_lora_weights="default", vera=False, lokr=False,
    )  # fmt: skip
    adapted = add_lora(model, settings, family=resolved.family, dtype="float32", seed=1)
    paddle.seed(3)
    for parameter in adapted.parameters():
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    keyed = KeyedDropout(model, seed=1, length_first=resolved.family.hidden_length_first)
    return SimpleNamespace(model=adapted, keyed=keyed, family=resolved.family)


def run(case, ids, segments, *, training=True, **inputs) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and the gradient of a LoRA matrix."""
    case.model.train() if training else case.model.eval()
    tensors = {name: paddle.to_tensor(array) for name, array in inputs.items()}
    with case.keyed.active(4, segments):
        logits = logits_of(case.model(input_ids=paddle.to_tensor(ids), **tensors))
        (logits * logits).sum().backward()
    weight = next(each for name, each in case.model.named_parameters() if name.endswith("lora_A"))
    gradient = weight.grad.numpy()
    case.model.clear_gradients()
    return logits.numpy(), gradient


def test_families_compute_the_same_alone_padded_and_packed(family_model):
    rows = random_rows(LENGTHS)
    alone = [run(family_model, row[None], [[(len(row), n)]])[0][0] for n, row in enumerate(rows)]
    ids = np.stack([np.pad(row, (0, max(LENGTHS) - len(row))) for row in rows])
    together, _ = run(family_model, ids, [[(len(row), n)] for n, row in enumerate(rows)])
    plain, _ = run(family_model, rows[0][None], [[(len(rows[0]), 0)]], training=False)
    assert np.abs(plain[0] - alone[0]).max() > 1e-3  # something is dropped
    for number, row in enumerate(rows):
        np.testing.assert_allclose(together[number, : len(row)], alone[number], rtol=1e-4, atol=1e-5)
    if not family_model.family.packing:
        return
    row = packed(rows)
    inputs = {"attention_mask": row["attention_mask"]}
    if family_model.family.positions == "position_ids":
        inputs["position_ids"] = row["position_ids"]
    in_row, _ = run(family_model, row["ids"], [[(len(each), n) for n, each in enumerate(rows)]], **inputs)
    np.testing.assert_allclose(in_row[0], np.concatenate(alone), rtol=1e-4, atol=1e-5)


def test_recomputed_layers_find_their_masks_again(family_model):
    ids, segments = random_rows([8])[0][None], [[(8, 5)]]
    logits, gradient = run(family_model, ids, segments)
    layers = [each for each in family_model.model.sublayers() if hasattr(each, "enable_recompute")]
    for layer in layers:
        layer.enable_recompute = True
    again, recomputed = run(family_model, ids, segments)
    for layer in layers:
        layer.enable_recompute = False
    np.testing.assert_allclose(again, logits, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(recomputed, gradient, rtol=1e-4, atol=1e-5)
