"""Adapters over a quantised base are merged into the original weights, or into what they were trained over."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.adapters.files import save_adapter
from finetune.adapters.lora import load_lora
from finetune.errors import UserError
from finetune.merge.lora import MergeOptions, merge
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.storage.quantisation.scheme import QuantisationScheme
from tests.merge.lora_writing import add_random_lora, folder_logits, logits, write_adapter, write_base
from tests.quantised_folders import write_quantised

NF4 = QuantisationScheme(algorithm="nf4", double_quant=True)
INT8 = QuantisationScheme(algorithm="weight_only_int8")


def write_trained(folder, base, scheme):
    """Saves an adapter with the record of a quantised base."""
    model = add_random_lora(base)
    model.model.base_quantisation = scheme
    folder.mkdir()
    save_adapter(model, folder)
    return folder


def expected_logits(base, adapter, scheme):
    model = load_model(resolve_model(base), dtype="float32", quantisation=scheme)
    return logits(load_lora(model, adapter))


@pytest.mark.parametrize(
    ("family", "hugging_face", "scheme"),
    [
        ("llama", False, NF4),
        ("llama", True, NF4),
        ("bloom", True, INT8),
        ("opt", False, INT8),
        ("qwen", True, NF4),
    ],
)
def test_into_both(tmp_path, capsys, family, hugging_face, scheme):
    base = write_base(tmp_path / "base", family, hugging_face=hugging_face)
    adapter = write_trained(tmp_path / "adapter", base, scheme)
    for into, used in (("original", None), ("dequantised", scheme)):
        merge(MergeOptions(base, (adapter,), tmp_path / into, into=into))
        found = folder_logits(tmp_path / into)
        np.testing.assert_allclose(found, expected_logits(base, adapter, used), atol=1e-4)
    difference = np.abs(folder_logits(tmp_path / "original") - folder_logits(tmp_path / "dequantised")).max()
    assert difference > 1e-3
    lines = capsys.readouterr().out
    assert f"note: trained over a base in {scheme.label}, merged into the original weights" in lines
    assert f"note: merged into the values of the base in {scheme.label}" in lines


def test_verify_measures_both(tmp_path, capsys):
    base = write_base(tmp_path / "base", "llama")
    adapter = write_trained(tmp_path / "adapter", base, NF4)
    merge(MergeOptions(base, (adapter,), tmp_path / "a", verify=True))
    assert f"against the base in {NF4.label} with the adapter: " in capsys.readouterr().out
    merge(MergeOptions(base, (adapter,), tmp_path / "b", verify=True, into="dequantised"))
    assert "against the original base with the adapter: " in capsys.readouterr().out


def test_what_has_no_dequantised_base_is_refused(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    plain = tmp_path / "plain"
    write_adapter(plain, base)
    trained = write_trained(tmp_path / "trained", base, NF4)
    for adapters in ((plain,), (trained, plain)):
        with pytest.raises(UserError, match="needs adapters that were trained over one quantised base"):
            merge(MergeOptions(base, adapters, tmp_path / "out", into="dequantised"))
    with pytest.raises(UserError, match="--unmerge does the opposite"):
        merge(MergeOptions(base, (trained,), tmp_path / "out", into="dequantised", unmerge=True))


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "gptq order"), ("qwen", "compressed int8"), ("bloom", "nf4"), ("opt", "int8")],
)
@pytest.mark.parametrize("save_format", ["paddle", "hf"])
def test_a_folder_that_is_quantised_becomes_ordinary_weights(tmp_path, capsys, family, kind, save_format):
    plain = write_base(tmp_path / "plain", family, hugging_face=True)
    base = write_quantised(plain, tmp_path / "base", kind)
    adapter = tmp_path / "adapter"
    expected = write_adapter(adapter, base)
    with pytest.raises(UserError, match="cannot take an adapter up as it is: add --into dequantised"):
        merge(MergeOptions(base, (adapter,), tmp_path / "out"))
    merge(
        MergeOptions(
            base, (adapter,), tmp_path / "out", into="dequantised", save_format=save_format, verify=True
        )
    )
    assert "note: merged into the values of the packed weights" in capsys.readouterr().out
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    np.testing.assert_allclose(folder_logits(tmp_path / "out"), expected, atol=2e-2)
    assert np.abs(folder_logits(tmp_path / "out") - folder_logits(plain)).max() > 0.1


def test_an_adapter_of_another_quantised_base_is_refused(tmp_path):
    plain = write_base(tmp_path / "plain", "llama", hugging_face=True)
    trained = write_trained(tmp_path / "trained", plain, NF4)
    base = write_quantised(plain, tmp_path / "base", "gptq")
    with pytest.raises(UserError, match="trained over another one in nf4"):
        merge(MergeOptions(base, (trained,), tmp_path / "out", into="dequantised"))
