"""PaddleNLP's OPT has an output layer of its own: what it writes is read, and what is written here it reads."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import OPTForCausalLM
from safetensors.numpy import load_file, save_file

from finetune.checkpoints.model_weights import save_model_weights
from finetune.checkpoints.writers import WholeTensorWriter
from finetune.families.family import get_family
from finetune.merge.lora import MergeOptions, merge
from finetune.models.loading import load_model, load_weights
from finetune.models.resolve import resolve_model
from finetune.models.shard_files import open_checkpoint
from finetune.serving.decoding.decoder import StaticDecoder
from finetune.serving.decoding.settings import DecodingSettings
from tests.merge.lora_writing import folder_logits, logits, write_adapter, write_base
from tests.merge.rank_writing import read_whole
from tests.serving.export.builders import build_sharp, dynamic_model, dynamic_text, export_folder, prompts

GREEDY = DecodingSettings(max_new_tokens=30, stop_ids=())
HEAD = "lm_head.decoder_weight"
TABLE = "opt.embeddings.word_embeddings.weight"


def paddlenlp_logits(folder) -> np.ndarray:
    model = OPTForCausalLM.from_pretrained(str(folder), dtype="float32")
    model.eval()
    return model(paddle.arange(3, 15).reshape([1, 12])).numpy()


@pytest.fixture
def untied(tmp_path):
    """A folder as PaddleNLP's training leaves it: the output layer is another tensor, the configuration silent."""
    model = OPTForCausalLM.from_pretrained(str(write_base(tmp_path / "base", "opt")), dtype="float32")
    paddle.seed(3)
    model.lm_head.decoder_weight.set_value(0.2 * paddle.randn(model.lm_head.decoder_weight.shape))
    model.save_pretrained(str(tmp_path / "untied"))
    assert (
        json.loads((tmp_path / "untied" / "config.json").read_text()).get("tie_word_embeddings") is not False
    )
    return tmp_path / "untied"


def save(model, folder):
    folder.mkdir()
    save_model_weights(model, folder, WholeTensorWriter())
    return folder


def test_what_paddlenlp_trained_is_read_and_what_is_written_it_reads(untied, tmp_path):
    expected = paddlenlp_logits(untied)
    model = load_model(resolve_model(untied), dtype="float32")
    np.testing.assert_allclose(logits(model), expected, atol=2e-5)
    written = save(model, tmp_path / "again")
    np.testing.assert_allclose(paddlenlp_logits(written), expected, atol=2e-5)
    np.testing.assert_allclose(folder_logits(written), expected, atol=2e-5)
    tied = folder_logits(tmp_path / "base")
    assert np.abs(expected - tied).max() > 0.1


def test_a_tied_output_layer_is_written_for_paddlenlp_too(tmp_path):
    base = write_base(tmp_path / "base", "opt")
    model = load_model(resolve_model(base), dtype="float32")
    assert model.config.tie_word_embeddings
    written = save(model, tmp_path / "again")
    np.testing.assert_allclose(paddlenlp_logits(written), logits(model), atol=2e-5)
    again = load_model(resolve_model(written), dtype="float32")
    assert (
        again.config.tie_word_embeddings
        and again.lm_head.decoder_weight is again.opt.embeddings.word_embeddings.weight
    )
    load_weights(again, written)
    np.testing.assert_array_equal(logits(again), logits(model))


def test_the_untied_layer_is_trained_and_the_embedding_beside_it(untied, tmp_path):
    model = load_model(resolve_model(untied), dtype="float32")
    optimizer = paddle.optimizer.SGD(0.5, parameters=model.parameters())
    ids = paddle.arange(3, 15).reshape([1, 12])
    paddle.nn.functional.cross_entropy(model(input_ids=ids)[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    tensors = load_file(save(model, tmp_path / "trained") / "model.safetensors")
    before = open_checkpoint(untied, get_family("opt"), {})
    changes = {name: np.abs(tensors[name] - before.read(name)).max() for name in (HEAD, TABLE)}
    assert min(changes.values()) > 0 and np.abs(tensors[HEAD] - tensors[TABLE]).max() > 0.1
    np.testing.assert_allclose(paddlenlp_logits(tmp_path / "trained"), logits(model), atol=2e-5)


@pytest.mark.parametrize("kind", ["untied", "base"])
@pytest.mark.parametrize("form", ["paddle", "hf"])
def test_merges(untied, kind, form, tmp_path):
    base = tmp_path / kind
    expected = write_adapter(tmp_path / "adapter", base)
    merge(MergeOptions(base, (tmp_path / "adapter",), tmp_path / "merged", save_format=form, verify=True))
    np.testing.assert_allclose(folder_logits(tmp_path / "merged"), expected, atol=2e-5)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    if form == "paddle":
        np.testing.assert_allclose(paddlenlp_logits(tmp_path / "merged"), expected, atol=2e-5)
    else:
        assert config["tie_word_embeddings"] is (kind == "base")
        assert ("lm_head.weight" in names) is (kind == "untied")


def test_an_adapter_that_trains_both_ends_whole(untied, tmp_path):
    expected = write_adapter(tmp_path / "adapter", untied, modules_to_save=["word_embeddings", "lm_head"])
    merge(MergeOptions(untied, (tmp_path / "adapter",), tmp_path / "merged"))
    np.testing.assert_allclose(paddlenlp_logits(tmp_path / "merged"), expected, atol=2e-5)


def test_more_tokens_grow_both_ends(untied, tmp_path):
    expected = write_adapter(tmp_path / "adapter", untied, num_tokens=104)
    merge(MergeOptions(untied, (tmp_path / "adapter",), tmp_path / "merged"))
    assert {name: each.shape[0] for name, each in read_whole(tmp_path / "merged").items() if name in (HEAD, TABLE)} == {
        HEAD: 104, TABLE: 104
    }  # fmt: skip
    np.testing.assert_allclose(folder_logits(tmp_path / "merged"), expected, atol=2e-5)


def test_untied_without_its_layer_is_a_fault(tmp_path):
    from finetune.errors import UserError

    base = write_base(tmp_path / "base", "opt", tie_word_embeddings=False)
    with pytest.raises(UserError, match=f"weights that the files lack.*{HEAD}"):
        load_model(resolve_model(base), dtype="float32")


def test_an_untied_model_as_a_static_graph(tmp_path):
    folder = build_sharp("opt", tmp_path / "model")
    tied = dynamic_text(dynamic_model(folder), prompts(), GREEDY)
    tensors = load_file(folder / "model.safetensors")
    generator = np.random.default_rng(5)
    tensors[HEAD] = generator.standard_normal(tensors[TABLE].shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "np"})
    expected = dynamic_text(dynamic_model(folder), prompts(), GREEDY)
    assert expected != tied
    assert StaticDecoder(export_folder(folder, tmp_path / "exported")).generate(prompts(), GREEDY) == expected
