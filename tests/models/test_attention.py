"""What attention kernels are handed, and that packed samples stay apart whatever the kernel.

There is no GPU here: FlashMask is stood in for by its documented definition, and Paddle's own plain form runs where a
fused kernel would.
"""

from __future__ import annotations

import json

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddlenlp.transformers.llama import fusion_ops

from finetune.data.batches.collate import start_end_rows
from finetune.families import attention
from finetune.families.family import get_family
from finetune.models.tiny.checkpoint import build_tiny
from finetune.training.loss import logits_of, token_loss_sum
from tests.families import decoding
from tests.families.cases import FACTS, small_options

FAMILIES = [name for name, facts in FACTS.items() if not facts.caps_scores]
CAPPED = [name for name, facts in FACTS.items() if facts.caps_scores]
LENGTHS = [6, 3, 5]


def hidden_by_definition(rows: np.ndarray, num_queries: int) -> np.ndarray:
    """FlashMask's docstring, causal with one number: key j is hidden from the queries before it and from its row on."""
    batch_size, num_heads, num_keys, _ = rows.shape
    hidden = np.zeros((batch_size, num_heads, num_queries, num_keys), dtype=bool)
    for batch in range(batch_size):
        for head in range(num_heads):
            for key in range(num_keys):
                hidden[batch, head, rows[batch, head, key, 0] :, key] = True
                hidden[batch, head, :key, key] = True
    return hidden


class Kernels:
    """Records what the kernels are handed; FlashMask by its definition, in Paddle so that gradients flow."""

    def __init__(self):
        self.flashmask: list[dict] = []
        self.dense: list[dict] = []
        self._dense_kernel = F.scaled_dot_product_attention

    def flashmask_attention(self, query, key, value, startend_row_indices=None, *, dropout=0.0, causal=False):
        self.flashmask.append({"rows": startend_row_indices, "causal": causal, "dropout": dropout})
        assert query.shape[2] % key.shape[2] == 0
        hidden = hidden_by_definition(startend_row_indices.numpy(), query.shape[1])
        groups = query.shape[2] // key.shape[2]
        query, key, value = (each.transpose([0, 2, 1, 3]) for each in (query, key, value))
        key, value = (each.repeat_interleave(groups, axis=1) for each in (key, value))
        scores = paddle.matmul(query, key, transpose_y=True) / query.shape[-1] ** 0.5
        scores = paddle.where(paddle.to_tensor(hidden), paddle.to_tensor(-np.inf, scores.dtype), scores)
        return paddle.matmul(F.softmax(scores, axis=-1), value).transpose([0, 2, 1, 3])

    def scaled_dot_product_attention(self, query, key, value, attn_mask=None, **more):
        self.dense.append({"mask": attn_mask, "query": query, "key": key, **more})
        return self._dense_kernel(query, key, value, attn_mask=attn_mask, **more)


@pytest.fixture
def kernels(monkeypatch):
    made = Kernels()
    monkeypatch.setattr(F, "flashmask_attention", made.flashmask_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", made.scaled_dot_product_attention)
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return get_family(request.param)


@pytest.fixture(scope="module")
def folder(family, corpus, tmp_path_factory):
    options = {"vocab_size": 330, "num_layers": 2, "hidden_size": 32}
    options |= small_options(family.name)
    return build_tiny(
        family.name, tmp_path_factory.mktemp("attention") / family.name, corpus=corpus, **options
    )


@pytest.fixture
def plain(folder):
    return decoding.load_sharp(folder)


@pytest.fixture
def fused(folder):
    return decoding.load_sharp(folder, use_flash_attention=True)


def packed(rows, kind: str) -> dict[str, np.ndarray]:
    """A packed row with the mask that the family asks for."""
    batch = decoding.packed(rows)
    if kind == "start_end":
        del batch["attention_mask"]
        lengths = [np.array([len(row) for row in rows])]
        batch["attn_mask_startend_row_indices"] = start_end_rows(lengths, batch["ids"].shape[1])
    return batch


def kind_of(family, *, has_prefix=False) -> str:
    return family.packed_mask({}, fused=True, half=True, has_prefix=has_prefix)


# Packed rows


def test_packed_samples_equal_separate_ones_on_the_kernel_of_the_family(family, plain, fused, kernels):
    rows, kind = decoding.family_rows(family, LENGTHS), kind_of(family)
    separate = np.concatenate([decoding.logits(plain, row[None])[0] for row in rows])
    batch = packed(rows, kind)
    together = decoding.logits(fused, batch.pop("ids"), **batch)[0]
    np.testing.assert_allclose(together, separate, atol=1e-5 * max(1, np.abs(separate).max()))
    if kind == "start_end":
        assert len(kernels.flashmask) == 2 and not kernels.dense  # a call for each layer
        ends = [[6] * 6 + [9] * 3 + [14] * 5]
        for call in kernels.flashmask:
            assert call["causal"] is True and call["dropout"] == 0.0
            assert call["rows"].dtype == paddle.int32 and call["rows"].shape == [1, 1, 14, 1]
            assert call["rows"][:, 0, :, 0].tolist() == ends
    else:
        assert len(kernels.dense) == 2 and not kernels.flashmask
        assert all(call["mask"] is not None and call["is_causal"] is False for call in kernels.dense)


def test_packed_rows_equal_a_block_mask_and_samples_do_not_see_each_other(family, fused, kernels):
    rows, kind = decoding.family_rows(family, LENGTHS), kind_of(family)
    by_block, by_kind = (
        decoding.logits(fused, batch.pop("ids"), **batch)[0]
        for batch in (packed(rows, "block"), packed(rows, kind))
    )
    np.testing.assert_allclose(by_kind, by_block, atol=1e-5 * max(1, np.abs(by_block).max()))
    changed = packed([rows[0], rows[1][::-1].copy() + 1, rows[2]], kind)
    difference = np.abs(decoding.logits(fused, changed.pop("ids"), **changed)[0] - by_kind).max(axis=-1)
    assert difference[6:9].min() > 1e-3
    assert difference[:6].max() < 1e-6 and difference[9:].max() < 1e-6


def loss_and_gradients(model, batch, labels):
    tensors = {name: paddle.to_tensor(array) for name, array in batch.items()}
    outputs = logits_of(model(input_ids=tensors.pop("ids"), **tensors))
    loss = token_loss_sum(outputs, paddle.to_tensor(labels))
    loss.backward()
    found = {name: each.grad.numpy() for name, each in model.named_parameters() if each.grad is not None}
    model.clear_gradients()
    return float(loss), found


@pytest.mark.parametrize("granularity", ["full", "core_attn"])
def test_gradients_of_packed_samples_with_recomputation(family, folder, plain, kernels, granularity):
    rows = decoding.family_rows(family, LENGTHS)
    labels = np.concatenate(decoding.family_rows(family, LENGTHS, seed=1))[None]
    expected_loss, expected = loss_and_gradients(plain, packed(rows, "block"), labels)
    fused = decoding.load_sharp(folder, use_flash_attention=True, recompute_granularity=granularity)
    fused.train()
    fused.recompute_enable()
    loss, found = loss_and_gradients(fused, packed(rows, kind_of(family)), labels)
    calls = kernels.flashmask or kernels.dense
    assert len(calls) == 4  # once more for each layer
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        bound = 2e-5 * max(1, np.abs(expected[name]).max())
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=bound, err_msg=name)


def test_packed_samples_behind_a_prefix_keep_apart_by_a_block_mask(family, plain, fused, kernels):
    assert kind_of(family, has_prefix=True) == "block"
    rows = decoding.family_rows(family, LENGTHS)
    plain, fused = (decoding.with_prefix(model, family) for model in (plain, fused))
    separate = np.concatenate([decoding.logits(plain, row[None])[0] for row in rows])
    batch = packed(rows, "block")
    together = decoding.logits(fused, batch.pop("ids"), **batch)[0]
    np.testing.assert_allclose(together, separate, atol=2e-5 * max(1, np.abs(separate).max()))
    assert kernels.dense and not kernels.flashmask


def test_end_rows_behind_a_prefix_and_without_a_kernel_are_no_silent_leak(family, plain, fused):
    if kind_of(family) == "block":
        return
    batch = packed(decoding.family_rows(family, LENGTHS), "start_end")
    ids = batch.pop("ids")
    with pytest.raises(ValueError, match="give a block mask"):
        decoding.logits(decoding.with_prefix(fused, family), ids, **batch)
    with pytest.raises(ValueError, match="without use_flash_attention"):
        decoding.logits(plain, ids, **batch)


# One statement of what is seen


def test_a_kernel_never_gets_a_mask_and_is_causal_together(family, plain, fused, kernels):
    rows = decoding.family_rows(family, [7, 4])
    ids, mask = decoding.right_padded(rows)
    for model in (fused, decoding.with_prefix(fused, family)):
        for inputs in ({}, {"attention_mask": mask}):
            decoding.logits(model, ids, **inputs)
    assert kernels.dense
    for call in kernels.dense:
        assert call["is_causal"] is (call["mask"] is None)
        assert call["mask"] is None or call["mask"].dtype == call["query"].dtype
        same_length = call["query"].shape[1] == call["key"].shape[1]
        # A kernel that is told "causal" behind a prefix may count from the first key.
        assert call["mask"] is not None or same_length


def test_rows_padded_on_the_right_need_no_mask(family, plain, fused, kernels):
    if FACTS[family.name].adds_distances or FACTS[family.name].sees_ahead:
        return
    ids, _ = decoding.right_padded(decoding.family_rows(family, [7, 4]))
    expected = decoding.logits(plain, ids)
    np.testing.assert_allclose(
        decoding.logits(fused, ids), expected, atol=2e-5 * max(1, np.abs(expected).max())
    )
    assert [call["mask"] for call in kernels.dense] == [None, None]


def test_a_prefix_without_a_mask_is_seen_whole(family, plain, fused):
    """PaddleNLP finds such a mask causal and drops it: the kernel then hides the last prefix tokens or the text."""
    ids = np.stack(decoding.family_rows(family, [7, 7]))
    expected, found = (decoding.logits(decoding.with_prefix(model, family), ids) for model in (plain, fused))
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, np.abs(expected).max()))


def test_decoding_with_a_cache_equals_one_pass(family, plain, fused):
    ids = np.stack(decoding.family_rows(family, [9, 9]))
    expected = decoding.logits(plain, ids)[:, 4:]
    found = decoding.stepwise_logits(fused, ids, 5)
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, np.abs(expected).max()))


def test_padding_on_the_left_is_finite_and_changes_nothing(family, plain, fused):
    rows = decoding.family_rows(family, [7, 4])
    length = 7
    ids = np.stack([np.pad(row, (length - len(row), 0)) for row in rows])
    mask = np.stack([np.arange(length) >= length - len(row) for row in rows]).astype(np.int64)
    positions = ((mask.cumsum(1) - 1) * mask).clip(0)
    found = decoding.logits(fused, ids, attention_mask=mask, position_ids=positions)
    assert np.isfinite(found).all()
    for place, row in enumerate(rows):
        alone = decoding.logits(plain, row[None])[0]
        bound = 2e-5 * max(1, np.abs(alone).max())
        np.testing.assert_allclose(found[place, length - len(row) :], alone, atol=bound)


READS = ["item", "numpy", "tolist", "__bool__", "__int__", "__float__", "__index__", "__array__"]


@pytest.mark.parametrize("given", ["nothing", "tokens", "block", "rows"])
def test_a_forward_pass_reads_nothing_back_from_the_device(family, fused, monkeypatch, given):
    monkeypatch.setattr(F, "flashmask_attention", lambda query, *_unused, **_more: query)
    rows = decoding.family_rows(family, [6, 3])
    inputs = {
        "nothing": {"ids": np.concatenate(rows)[None]},
        "tokens": {"ids": np.concatenate(rows)[None], "attention_mask": np.ones((1, 9), np.int64)},
        "block": packed(rows, "block"),
        "rows": packed(rows, kind_of(family)),
    }[given]
    tensors = {name: paddle.to_tensor(array) for name, array in inputs.items()}
    reads: list[str] = []
    for name in READS:
        stock = getattr(paddle.Tensor, name)

        def read(self, *arguments, stock=stock, name=name, **more):
            reads.append(name)
            return stock(self, *arguments, **more)

        monkeypatch.setattr(paddle.Tensor, name, read)
    with paddle.no_grad():
        fused(input_ids=tensors.pop("ids"), **tensors)
    # Routers tell the host how many tokens each expert gets.
    assert reads == ["tolist", "numpy"] * (
        fused.config.num_hidden_layers if FACTS[family.name].chooses_experts else 0
    )
    bool(paddle.ones([1]))
    assert reads  # a read is seen


def test_paddlenlp_hands_over_both_and_the_mask_is_lost(kernels):
    """What stands behind the stand-in: with a block mask and is_causal, samples see each other."""
    paddle.seed(0)
    query, key, value = (paddle.randn([1, 9, 2, 4]) for _ in range(3))
    block = paddle.to_tensor(packed(decoding.random_rows([6, 3]), "block")["attention_mask"])
    config = type("Config", (), {"context_parallel_degree": 1})
    mask = attention.additive(block, paddle.float32)
    theirs = fusion_ops.fusion_flash_attention(query, config, key, value, mask, False)
    (call,) = kernels.dense
    assert call["mask"] is not None and call["is_causal"] is True
    ours = attention.fused_attention(query, key, value, block).flatten(2)
    assert (theirs - ours)[:, :6].abs().max() < 1e-5
    assert (theirs - ours)[:, 6:].abs().max() > 0.05


# Masks


def test_dense_masks_of_every_form():
    rows = paddle.to_tensor(start_end_rows([np.array([3, 2])], 6))
    block = attention.dense_mask(rows, (1, 6))
    assert block.astype("int64")[0, 0].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    behind_two = attention.dense_mask(None, (1, 2), 2).astype("int64")
    assert behind_two[0, 0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    padded = attention.dense_mask(paddle.to_tensor([[0, 1, 1]]), (1, 3)).astype("int64")
    assert padded[0, 0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]  # the padding sees itself


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_added_masks_are_finite_and_of_the_type_of_the_query(dtype):
    dtype = getattr(paddle, dtype)
    wide = attention.additive(paddle.to_tensor([[True, False]]), paddle.float32)
    for mask in (paddle.to_tensor([[True, False]]), wide):
        added = attention.additive(mask, dtype)
        assert added.dtype == dtype
        assert added.astype("float32").tolist() == [[0.0, paddle.finfo(dtype).min]]


def test_a_window_narrows_end_rows(corpus, tmp_path, kernels):
    folder = build_tiny(
        "mistral", tmp_path / "m", corpus=corpus, vocab_size=330, num_layers=2, hidden_size=32
    )
    plain, fused = (
        decoding.load_sharp(folder, sliding_window=3, use_flash_attention=on) for on in (False, True)
    )
    rows = decoding.random_rows([8, 5])
    expected, found = (
        decoding.logits(model, batch.pop("ids"), **batch)
        for model, batch in ((plain, packed(rows, "block")), (fused, packed(rows, "start_end")))
    )
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, np.abs(expected).max()))
    assert kernels.flashmask[0]["rows"][0, 0, :, 0].tolist() == [3, 4, 5, 6, 7, 8, 8, 8, 11, 12, 13, 13, 13]
    unwindowed = decoding.load_sharp(folder)
    batch = packed(rows, "block")
    assert np.abs(decoding.logits(unwindowed, batch.pop("ids"), **batch) - expected).max() > 1e-2


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_windows_from_a_layer_on_hold_in_packed_rows_too(name, corpus, tmp_path, kernels):
    folder = build_tiny(name, tmp_path / "m", corpus=corpus, vocab_size=330, num_layers=2, hidden_size=32)
    config = json.loads((folder / "config.json").read_text())
    windows = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    unwindowed = decoding.load_sharp(folder)
    (folder / "config.json").write_text(json.dumps(config | windows))
    plain, fused = (decoding.load_sharp(folder, use_flash_attention=on) for on in (False, True))
    rows = decoding.random_rows([8, 5])
    separate = np.concatenate([decoding.logits(plain, row[None])[0] for row in rows])
    assert np.abs(decoding.logits(unwindowed, rows[0][None])[0] - separate[:8]).max() > 1e-2
    for model, kind in ((plain, "block"), (fused, "start_end")):
        batch = packed(rows, kind)
        together = decoding.logits(model, batch.pop("ids"), **batch)[0]
        np.testing.assert_allclose(together, separate, atol=2e-5 * max(1, np.abs(separate).max()))
    whole, narrow = (call["rows"][0, 0, :, 0].tolist() for call in kernels.flashmask)
    assert narrow == [3, 4, 5, 6, 7, 8, 8, 8, 11, 12, 13, 13, 13] and whole == [8] * 8 + [13] * 5


@pytest.mark.parametrize("kind", ["block", "start_end"])
@pytest.mark.parametrize("name", CAPPED)
def test_capped_scores_are_worked_out_without_a_kernel(name, kind, corpus, tmp_path, kernels):
    folder = build_tiny(name, tmp_path / "m", corpus=corpus, vocab_size=330, num_layers=2, hidden_size=32)
    plain, fused = (
        decoding.load_sharp(folder, sliding_window=3, use_flash_attention=on) for on in (False, True)
    )
    rows = decoding.random_rows([8, 5])
    separate = np.concatenate([decoding.logits(plain, row[None])[0] for row in rows])
    batch = packed(rows, kind)
    together = decoding.logits(fused, batch.pop("ids"), **batch)[0]
    np.testing.assert_allclose(together, separate, atol=1e-5 * max(1, np.abs(separate).max()))
    assert not kernels.flashmask and not kernels.dense


def test_only_layers_with_a_window_get_narrow_rows(corpus, tmp_path, kernels):
    folder = build_tiny("gemma3", tmp_path / "m", corpus=corpus, vocab_size=330, num_layers=2, hidden_size=32)
    model = decoding.load_sharp(folder, sliding_window=3, use_flash_attention=True)
    batch = packed(decoding.random_rows([8, 5]), "start_end")
    decoding.logits(model, batch.pop("ids"), **batch)
    narrow, whole = (call["rows"][0, 0, :, 0].tolist() for call in kernels.flashmask)
    assert narrow == [3, 4, 5, 6, 7, 8, 8, 8, 11, 12, 13, 13, 13] and whole == [8] * 8 + [13] * 5
