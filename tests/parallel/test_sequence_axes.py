"""Why sep_parallel_degree and context_parallel_degree are refused: what PaddleNLP's classes for them do."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddlenlp.transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ring_flash_attention,
    segment_parallel_utils,
)


@pytest.fixture(scope="module")
def llama() -> ModuleType:
    """PaddleNLP's module as it is shipped, whatever stands in for its functions in this process."""
    shipped = Path(inspect.getfile(LlamaForCausalLM))
    name = "paddlenlp.transformers.llama.shipped"
    spec = importlib.util.spec_from_file_location(name, shipped)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


def test_rows_are_exchanged_into_the_tensors_that_hold_them(monkeypatch):
    """Paddle 3 takes outputs first, PaddleNLP gives inputs first: what was computed is overwritten, and lost."""
    names = list(inspect.signature(dist.alltoall).parameters)
    assert names[:2] == ["out_tensor_list", "in_tensor_list"]
    given = []
    monkeypatch.setattr(segment_parallel_utils.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(segment_parallel_utils.dist, "alltoall", lambda *args, **_: given.append(args))
    rows = paddle.arange(8, dtype="float32").reshape([1, 2, 4])
    segment_parallel_utils._reshard_qkv(rows, group=SimpleNamespace())
    outputs, _ = given[0]
    np.testing.assert_array_equal(paddle.concat(outputs, axis=2).numpy(), rows.numpy())


def test_packed_samples_see_each_other_where_heads_are_exchanged_for_rows(llama):
    config = SimpleNamespace(use_flash_attention=False, context_parallel_degree=1, sep_parallel_degree=1)
    paddle.seed(1)
    query, key, value = (paddle.randn([1, 4, 2, 8]) for _ in range(3))
    apart = np.full((4, 4), -1e9, "float32")
    apart[:2, :2] = apart[2:, 2:] = np.triu(np.full((2, 2), -1e9, "float32"), 1)
    mask = paddle.to_tensor(apart.reshape(1, 1, 4, 4))

    def attend(reshard):
        return llama.scaled_dot_product_attention(
            query, config, key, value, mask, output_attentions=True, reshard_layer=reshard
        )[1]

    assert float(attend(None)[0, :, 2:, :2].max()) < 1e-20
    exchanged = attend(lambda tensor, **_: tensor)
    assert float(exchanged[0, :, 2:, :2].min()) > 0.01


def test_ring_attention_takes_no_mask_and_no_cpu(llama, monkeypatch):
    group = SimpleNamespace(rank=0, nranks=1, world_size=1, ranks=[0])
    parts = [paddle.randn([1, 4, 2, 8]) for _ in range(3)]
    with pytest.raises(RuntimeError, match="`flash_attn` is not registered"):
        ring_flash_attention.balanced_ring_flash_attention_fwd_func(group, *parts, is_causal=True)
    assert importlib.util.find_spec("paddlenlp_ops") is None  # its backward pass
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, context_parallel_degree=2, **sizes))
    ids = paddle.ones([1, 4], dtype="int64")
    with pytest.raises(NotImplementedError, match="dosen't support attention_mask"):
        model(ids, attention_mask=paddle.zeros([1, 1, 4, 4]))


def test_qwen2_has_neither():
    import paddlenlp.transformers.qwen2.modeling as qwen2

    source = inspect.getsource(qwen2)
    assert "sep_parallel_degree" not in source and "context_parallel_degree" not in source
