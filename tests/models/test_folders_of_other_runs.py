"""Model folders as PaddleNLP's tensor-parallel runs and its merges leave them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from finetune.families.family import get_family
from finetune.merge import lora, tensor_parallel
from finetune.merge.lora import MergeOptions, merge
from finetune.storage.files import write_json
from tests.merge.lora_writing import folder_logits, write_adapter, write_base
from tests.merge.rank_writing import read_whole, write_ranks

LAYOUT = {
    "tensor_parallel_degree": 2, "tensor_parallel_rank": 0, "tensor_parallel_output": True, "sequence_parallel": True,
    "pipeline_parallel_degree": 2, "virtual_pp_degree": 2, "quantization_config": None,
    "use_flash_attention": True, "use_fused_rms_norm": True,
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "chatglm2"])
def test_a_whole_model_whose_configuration_tells_of_ranks(name, tmp_path):
    base = write_base(tmp_path / "base", name)
    expected = folder_logits(base)
    config = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", config | LAYOUT)
    np.testing.assert_allclose(folder_logits(base), expected, atol=1e-5)


@pytest.fixture
def both_forms(tmp_path):
    """Files of two ranks, and the same weights in one piece beside them, as PaddleNLP's merge leaves them."""
    import paddle

    base = write_base(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text())
    weights = read_whole(base)
    folder = write_ranks(tmp_path / "run", (config, weights), get_family("llama"), tensor=2)
    paddle.save(weights, str(folder / "model_state.pdparams"))
    return folder


def test_whole_weights_beside_those_of_ranks(both_forms, tmp_path):
    names = {path.name for path in both_forms.iterdir()}
    assert {"model_state.pdparams", "model_state.tp00.pdparams", "model_state.tp01.pdparams"} <= names
    np.testing.assert_allclose(folder_logits(both_forms), folder_logits(tmp_path / "base"), atol=1e-6)


def test_such_a_folder_as_the_base_of_a_merge(both_forms, tmp_path):
    expected = write_adapter(tmp_path / "adapter", both_forms)
    merge(MergeOptions(both_forms, (tmp_path / "adapter",), tmp_path / "merged", verify=True))
    np.testing.assert_allclose(folder_logits(tmp_path / "merged"), expected, atol=2e-5)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tensor_parallel_degree"] == 1


def test_options_of_paddlenlps_merge_scripts():
    words = ["--model_name_or_path", "base", "--lora_path", "a", "--output_path", "out", "--device", "npu"]
    options = lora.parse_options([*words, "--low_gpu_mem", "true"])
    assert str(options.output) == "out"
    words = ["--model_name_or_path", "run", "--output_path", "out", "--device", "xpu", "--low_gpu_mem"]
    assert str(tensor_parallel.parse_options(words).output) == "out"
    with pytest.raises(SystemExit):
        lora.parse_options(["--lora_path", "a", "--output_path", "out", "--device", "abacus"])
