"""Static text = dynamic text, for every family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.commands.predict import main
from finetune.errors import UserError
from finetune.families.family import families, get_family
from finetune.models.resolve import resolve_model
from finetune.serving.decoding.decoder import StaticDecoder
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.export.options import ExportOptions
from finetune.serving.export.run import export
from tests.conftest import launch
from tests.families.decoding import with_lora, with_prefix
from tests.serving.export.builders import build_sharp, dynamic_model, dynamic_text, export_folder, prompts

GREEDY = DecodingSettings(max_new_tokens=30, stop_ids=())
PENALISED = DecodingSettings(max_new_tokens=30, stop_ids=(), repetition_penalty=1.3)


def test_families_without_a_description_are_refused_before_their_weights_are_read(sharp_llama, tmp_path):
    options = ExportOptions(model_name_or_path=str(sharp_llama), output_path=tmp_path / "exported")
    resolved = resolve_model(sharp_llama)
    undescribed = replace(resolved, family=replace(resolved.family, name="undescribed"), folder=tmp_path)
    with pytest.raises(UserError, match="family undescribed cannot be exported to a static graph"):
        export(options, undescribed)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("name", sorted(families()))
def test_greedy_text_is_that_of_the_dynamic_model(name, tmp_path):
    folder = build_sharp(name, tmp_path / "model")
    decoder = StaticDecoder(export_folder(folder, tmp_path / "exported"))
    model = dynamic_model(folder)
    seen = set()
    for rows in (prompts([7], seed=1), prompts()):
        for settings in (GREEDY, PENALISED):
            expected = dynamic_text(model, rows, settings)
            assert decoder.generate(rows, settings) == expected
            seen |= {token for answer in expected for token in answer}
    assert len(seen) > 30, "the model repeats itself, so that equal texts say nothing"


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_falcon_with_one_norm_for_both_branches_and_with_distances(num_kv_heads, tmp_path):
    folder = build_sharp("falcon", tmp_path / "model", num_key_value_heads=num_kv_heads)
    decoder = StaticDecoder(export_folder(folder, tmp_path / "exported"))
    expected = dynamic_text(dynamic_model(folder), prompts(), GREEDY)
    assert decoder.generate(prompts(), GREEDY) == expected
    assert len({token for answer in expected for token in answer}) > 15


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_moe", {"num_experts": 4, "mlp_only_layers": [0]}),
        ("qwen2_moe", {"num_experts_per_tok": 1}),
        ("mixtral", {"sliding_window": 4, "num_experts_per_tok": 4}),
    ],
)
def test_experts_in_some_layers_and_few_or_all_for_a_token(name, changes, tmp_path):
    folder = build_sharp(name, tmp_path / "model")
    if "mlp_only_layers" in changes:
        give_dense_layer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    expected = dynamic_text(dynamic_model(folder), prompts(), GREEDY)
    assert len({token for answer in expected for token in answer}) > 20
    assert StaticDecoder(export_folder(folder, tmp_path / "exported")).generate(prompts(), GREEDY) == expected


def give_dense_layer(folder: Path) -> None:
    """The first layer's experts become one feed-forward network of twice their width."""
    path = folder / "model.safetensors"
    tensors, found = load_file(path), {}
    for name, array in tensors.items():
        layer, _, part = name.partition(".mlp.")
        if not (part and ".layers.0" in layer):
            found[name] = array
        elif part.startswith("experts.0."):
            axis, other = int("down" not in part), name.replace("experts.0", "experts.1")
            found[name.replace("experts.0.", "")] = np.concatenate(
                [array, tensors[other]], axis=1 if axis else 0
            )
    save_file(found, path, metadata={"format": "np"})


def test_the_scripts_export_and_answer_with_experts(tmp_path):
    """Through the command; both modes of predict_generation.py give the same lines."""
    folder = build_sharp("qwen3_moe", tmp_path / "model")
    exported = tmp_path / "exported"
    result = launch(
        "export_model.py", "--model_name_or_path", folder, "--output_path", exported, "--device", "cpu"
    )
    assert result.returncode == 0, result.stderr
    data = tmp_path / "in.jsonl"
    data.write_text('{"src": "a red dress"}\n{"src": "上衣"}\n{"src": "白色 上衣 显瘦, for all days"}\n')
    answers = []
    for number, model in enumerate((folder, exported)):
        out = tmp_path / f"{number}.jsonl"
        given = {"model_name_or_path": model, "data_file": data, "output_file": out, "device": "cpu"}
        options = given | {"max_new_tokens": 12}
        main([str(part) for name, value in options.items() for part in (f"--{name}", value)])
        answers.append(out.read_text(encoding="utf-8"))
    assert answers[0] == answers[1] and len(set(answers[0].splitlines())) == 3


def test_a_mixture_of_experts_is_not_quantised(tmp_path):
    folder = build_sharp("mixtral", tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"nothing that could be read")
    with pytest.raises(UserError, match=r"quantize is int8, and .* is a mixture of experts"):
        export_folder(folder, tmp_path / "exported", quantize="int8")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("name", ["llama", "chatglm2", "bloom"])
def test_a_prefix_is_exported_with_the_model(name, tmp_path):
    from finetune.adapters.files import save_adapter

    folder = build_sharp(name, tmp_path / "model")
    model = with_prefix(dynamic_model(folder), get_family(name))
    _save(model, model.prefix_config, tmp_path / "prefix", save_adapter)
    decoder = StaticDecoder(export_folder(folder, tmp_path / "exported", prefix_path=tmp_path / "prefix"))
    assert decoder.facts.num_prefix_tokens == 3
    expected = dynamic_text(model, prompts(), GREEDY)
    assert decoder.generate(prompts(), GREEDY) == expected
    assert expected != dynamic_text(dynamic_model(folder), prompts(), GREEDY)


def test_lora_is_merged_into_the_exported_weights(sharp_llama, tmp_path):
    import paddle

    from finetune.adapters.files import save_adapter

    model = with_lora(dynamic_model(sharp_llama), get_family("llama"))
    model.eval()
    paddle.seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.set_value(paddle.randn(parameter.shape) * 0.3)
    _save(model, model.lora_config, tmp_path / "lora", save_adapter)
    decoder = StaticDecoder(export_folder(sharp_llama, tmp_path / "exported", lora_path=tmp_path / "lora"))
    expected = dynamic_text(model.model, prompts(), GREEDY)
    assert decoder.generate(prompts(), GREEDY) == expected
    assert expected != dynamic_text(dynamic_model(sharp_llama), prompts(), GREEDY)


def test_a_sliding_window_and_scaled_positions(tmp_path):
    """Settings of config.json that change what attention sees."""
    for name, changes in (
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
        ),
        ("llama", {"alibi": True}),  # with two query heads for each key head
    ):
        folder = build_sharp(name, tmp_path / f"{name}_{next(iter(changes))}")
        plain = dynamic_text(dynamic_model(folder), prompts(), GREEDY)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        expected = dynamic_text(dynamic_model(folder), prompts(), GREEDY)
        assert expected != plain
        decoder = StaticDecoder(export_folder(folder, tmp_path / f"exported_{folder.name}"))
        assert decoder.generate(prompts(), GREEDY) == expected


def _save(model, config, folder, save_adapter) -> None:
    folder.mkdir()
    save_adapter(model, folder)
    config.save_pretrained(str(folder))
