"""The decoder that is exported computes in half precision what training computed.

A CPU cannot run such a program; its layers are run one by one here, with half precision rehearsed.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from finetune.families.context_marks import find_marks
from finetune.families.decoder_description import describe
from finetune.families.family import get_family
from finetune.machine.half_precision import half_precision_on_cpu
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.serving.decoding.token_choice import Choice
from finetune.serving.export.generation_graph import GenerationGraph, _extend, _Loop
from finetune.training.loss import logits_of
from tests.families.cases import FACTS
from tests.families.decoding import CONTEXT_END
from tests.serving.export.builders import build_sharp

FAMILIES = [
    "llama",
    "chatglm2",
    "qwen",
    "bloom",
    "opt",
    "qwen2",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3",
    "qwen2_moe",
    "chatglm",
]
PROMPT, LENGTH = 596, 600


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    """Small enough that half precision follows: one layer, and a limit of positions behind the text."""
    target = tmp_path_factory.mktemp("half") / name
    return build_sharp(name, target, num_layers=2, hidden_size=64, max_length=1024)


@pytest.fixture(autouse=True)
def half():
    with half_precision_on_cpu():
        yield


def load(folder, dtype: str):
    """The model, its weights those of bfloat16 in any type, its norms not all ones."""
    model = load_model(resolve_model(folder), dtype=dtype, config_overrides={"use_cache": False})
    random = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        values = parameter.astype("float32").numpy()
        if ("norm" in name or "ln_" in name) and "weight" in name:
            values = values + 0.3 * random.normal(size=values.shape).astype(np.float32)
        else:
            values = values * 0.4
        parameter.set_value(paddle.to_tensor(values).astype("bfloat16").astype(parameter.dtype))
    model.eval()
    return model


def whole_logits(model, ids) -> np.ndarray:
    with paddle.no_grad():
        return logits_of(model(input_ids=paddle.to_tensor(ids))).astype("float32").numpy()


def stepwise_logits(description, dtype: str, ids) -> np.ndarray:
    """Logits of the last tokens: the prompt in one pass, then one token at a time with the cache."""
    graph = GenerationGraph(description, dtype)
    shape = description.shape
    choice = Choice(
        paddle.to_tensor([1, 0, 0, 0]),
        paddle.to_tensor([1.0, 1.0, 1.0]),
        paddle.to_tensor([-1]),
        paddle.zeros([len(ids), 1]),
    )
    padding = paddle.zeros([len(ids)], dtype="int64")
    empty = paddle.zeros([1, shape.num_kv_heads, len(ids), 0, shape.head_dim]).astype(dtype)
    caches, start, found = [(empty, empty)] * shape.num_layers, 0, []
    with paddle.no_grad():
        for end in range(PROMPT, ids.shape[1] + 1):
            loop = _Loop(graph, choice, padding, end=end, history_end=0)
            places = paddle.arange(start, end).unsqueeze(0).expand([len(ids), end - start])
            marks = shape.context_marks and paddle.to_tensor(
                find_marks(ids[:, :end], shape.context_marks.ids)
            )
            new = paddle.to_tensor(ids[:, start:end])
            logits, caches = graph.decoder(
                new, loop.positions(places, marks), loop.prompt_masks(start, marks), caches, _extend
            )
            found.append(logits[:, 0].numpy())
            start = end
    return np.stack(found, axis=1)


def test_exported_layers_are_as_exact_as_those_that_were_trained(name, folder):
    ids = np.stack([np.random.default_rng(row).integers(3, 300, LENGTH) for row in range(3)])
    family = get_family(name)
    if FACTS[name].sees_ahead:
        ids[:, PROMPT - 12 : PROMPT - 10] = CONTEXT_END
    exact = whole_logits(load(folder, "float32"), ids)[:, PROMPT - 1 :]
    in_half = load(folder, "bfloat16")
    trained = whole_logits(in_half, ids)[:, PROMPT - 1 :]
    exported = stepwise_logits(describe(in_half, family), "bfloat16", ids)
    in_float32 = stepwise_logits(describe(load(folder, "float32"), family), "float32", ids)
    scale = exact.std()
    np.testing.assert_allclose(in_float32, exact, atol=1e-3 * scale)
    ours, theirs = np.abs(exported - exact).mean() / scale, np.abs(trained - exact).mean() / scale
    assert theirs < 0.02
    assert ours < 1.1 * theirs
    assert np.abs(exported - trained).mean() / scale < theirs
