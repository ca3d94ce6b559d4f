"""Folders that others quantised: packed in memory, with the values of their own definitions, adapted and trained."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from finetune.adapters.lora import add_lora
from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.merge.lora import MergeOptions, merge
from finetune.merge.lora_base import open_base
from finetune.models.loading import load_model
from finetune.models.quantised.layers import packed_layers
from finetune.models.resolve import resolve_model
from finetune.storage.quantisation.scheme import QuantisationScheme
from finetune.training.loss import logits_of
from tests.merge.lora_writing import folder_logits, write_adapter, write_base
from tests.models.test_quantised_layers import LORA
from tests.quantised_folders import KINDS, write_paddlenlp, write_quantised

IDS = np.random.default_rng(0).integers(5, 60, (2, 12))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """(family, kind) -> quantised folder, made when first asked for."""
    made = {}

    def folder(family: str, kind: str):
        if family not in made:
            root = tmp_path_factory.mktemp("stored")
            made[family] = write_base(root / family, family, hugging_face=True)
        if (family, kind) not in made:
            made[family, kind] = write_quantised(
                made[family], made[family].parent / f"{family} {kind}".replace(" ", "-"), kind
            )
        return made[family, kind]

    return folder


def load(folder, **options):
    return load_model(
        resolve_model(folder), dtype="float32", config_overrides={"use_cache": False}, **options
    )


def logits(model):
    with paddle.no_grad():
        return logits_of(model(input_ids=paddle.to_tensor(IDS))).numpy()


def train(model, num_steps: int = 4) -> list[float]:
    ids = paddle.to_tensor(IDS)
    trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    optimizer = paddle.optimizer.SGD(0.5, parameters=trained)
    found = []
    for _ in range(num_steps):
        values = logits_of(model(input_ids=ids)).astype("float32")
        loss = paddle.nn.functional.cross_entropy(values[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        found.append(float(loss))
    return found


CASES = [("llama", kind) for kind in KINDS] + [
    ("qwen", "gptq"), ("qwen", "compressed int8"), ("bloom", "nf4"), ("opt", "gptq order"), ("chatglm2", "awq"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_packed_layers_compute_with_the_values_of_the_definition(folder_of, family, kind):
    folder = folder_of(family, kind)
    packed, plain = load(folder), load(f"{folder}-values")
    layers = packed_layers(packed)
    expected = {name for name, layer in plain.named_sublayers() if isinstance(layer, paddle.nn.Linear)}
    assert set(layers) == expected - {"lm_head"} and layers
    for name, layer in layers.items():
        np.testing.assert_array_equal(
            layer.packed.values().numpy().T, plain.get_sublayer(name).weight.numpy()
        )
    np.testing.assert_allclose(logits(packed), logits(plain), atol=1e-5)
    np.testing.assert_array_equal(logits(load(folder, keep_packed=False)), logits(plain))


@pytest.mark.parametrize("kind", ["gptq order", "awq", "compressed int8", "nf4"])
def test_lora_over_a_packed_folder_trains_as_over_its_values(folder_of, kind):
    folder = folder_of("llama", kind)
    found = []
    for path in (folder, f"{folder}-values"):
        resolved = resolve_model(path)
        model = add_lora(load(path), SimpleNamespace(**LORA), family=resolved.family, dtype="float32", seed=1)
        model.mark_only_lora_as_trainable()
        model.train()
        found.append(train(model))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0][-1] < found[0][0] - 0.05


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed int8", "compressed int4", "nf4", "int8"])
def test_layers_that_were_left_out_and_a_packed_output_layer(tmp_path, kind):
    plain = write_base(tmp_path / "plain", "llama", hugging_face=True)
    layers = re.compile(r"layers\.0\..*(q|k|up|down)_proj\.weight$|lm_head\.weight$")
    folder = write_quantised(plain, tmp_path / "packed", kind, layers)
    packed, values = load(folder), load(f"{folder}-values")
    names = [name.rpartition(".")[2] for name in packed_layers(packed)]
    assert names == ["q_proj", "k_proj", "up_proj", "down_proj"]
    np.testing.assert_allclose(logits(packed), logits(values), atol=1e-5)
    found = []
    for model in (packed, values):
        adapted = add_lora(
            model, SimpleNamespace(**LORA), family=get_family("llama"), dtype="float32", seed=1
        )
        adapted.mark_only_lora_as_trainable()
        adapted.train()
        found.append(train(adapted))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    expected = write_adapter(tmp_path / "adapter", folder)
    merge(MergeOptions(folder, (tmp_path / "adapter",), tmp_path / "out", into="dequantised"))
    np.testing.assert_allclose(folder_logits(tmp_path / "out"), expected, atol=2e-2)


def test_a_packed_output_layer_that_is_said_to_be_the_embedding_is_refused(tmp_path):
    plain = write_base(tmp_path / "plain", "llama", hugging_face=True)
    folder = write_quantised(plain, tmp_path / "packed", "gptq", re.compile(r"(q_proj|lm_head)\.weight$"))
    expected = logits(load(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    message = "lm_head.weight is quantised, while config.json says .* set tie_word_embeddings to false"
    with pytest.raises(UserError, match=message):
        load(folder)
    with pytest.raises(UserError, match=message):
        open_base(folder)
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    np.testing.assert_array_equal(logits(load(folder)), expected)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_paddlenlps_own_folders(tmp_path, family):
    folder = write_paddlenlp(write_base(tmp_path / "plain", family), tmp_path / "packed")
    packed, plain = load(folder), load(f"{folder}-values")
    assert packed_layers(packed)
    for name, layer in packed_layers(packed).items():
        np.testing.assert_array_equal(
            layer.packed.values().numpy().T, plain.get_sublayer(name).weight.numpy()
        )
    np.testing.assert_allclose(logits(packed), logits(plain), atol=1e-5)


def test_a_quantised_folder_is_not_quantised_once_more(folder_of):
    with pytest.raises(UserError, match=r"is quantised already \(GPTQ, 4 bits, groups of 32\)"):
        load(folder_of("llama", "gptq"), quantisation=QuantisationScheme(algorithm="nf4"))
