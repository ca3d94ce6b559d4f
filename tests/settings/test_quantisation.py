"""The settings of a quantised base, their names in other tools, and what an adapter says about its own."""

import json
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.settings.quantisation import scheme_of
from finetune.storage.quantisation.record import FACTS_FILE, QUANTISATION
from finetune.storage.quantisation.scheme import QuantisationScheme
from tests.settings.argument_files import parse

pytestmark = pytest.mark.usefixtures("in_a_folder_with_data")


def scheme(settings=None, *words: str):
    return scheme_of(vars(parse({"lora": True} | (settings or {}), *words).model))


def fault(settings, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(settings, *words)
    (only,) = caught.value.faults
    return only


NF4 = QuantisationScheme(algorithm="nf4")
NF4_DOUBLE = QuantisationScheme(algorithm="nf4", double_quant=True)
INT8 = QuantisationScheme(algorithm="llm.int8")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"weight_quantize_algo": None, "weight_blocksize": 64, "weight_double_quant": False}, None),
        ({"weight_quantize_algo": "off"}, None),
        ({"weight_quantize_algo": "nf4"}, NF4),
        ({"weight_quantize_algo": "weight_only_int8"}, QuantisationScheme(algorithm="weight_only_int8")),
        (
            {
                "weight_quantize_algo": "fp4",
                "qlora_weight_blocksize": 128,
                "qlora_weight_double_quant": True,
                "qlora_weight_double_quant_block_size": 64,
            },
            QuantisationScheme(algorithm="fp4", block_size=128, double_quant=True, double_quant_block_size=64),
        ),
        ({"quantization_bit": 4}, NF4_DOUBLE),
        ({"quantization_bit": 8, "quantization_method": "bnb"}, INT8),
        ({"quantization_bit": 4, "double_quantization": False}, NF4),
        ({"double_quantization": False, "quantization_bit": 4}, NF4),
        ({"quantization_bit": 4, "quantization_type": "fp4"},
         QuantisationScheme(algorithm="fp4", double_quant=True)),
        ({"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_use_double_quant": False}, NF4),
        ({"load_in_8bit": True}, INT8),
        ({"load_in_4bit": False}, None),
    ],
)  # fmt: skip
def test_what_is_read(settings, expected):
    assert scheme(settings) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight_quantize_algo": "nf4"}, ("nf4, but packed weights cannot be trained", "--lora true")),
        ({"weight_quantize_algo": "nf4", "prefix_tuning": True}, ("packed weights cannot be trained",)),
        ({"weight_quantize_algo": "a8w8", "lora": True}, ('"a8w8"', "nf4, fp4, weight_only_int8, llm.int8")),
        ({"weight_quantize_algo": "weight_only_int4", "lora": True}, ('"weight_only_int4"', "choose one of")),
        ({"weight_quantize_algo": "nf4", "lora": True, "pissa": True}, ("pissa is true", "choose one")),
        ({"weight_blocksize": 48}, ("weight_blocksize is 48", "32, 64, 128")),
        ({"weight_blocksize": 16}, ("weight_blocksize is 16", "from 32 up to 4096")),
        ({"weight_double_quant_block_size": 100}, ("weight_double_quant_block_size is 100",)),
        ({"quantization_bit": 3}, ("quantization_bit is 3", "4 is weight_quantize_algo nf4")),
        ({"quantization_method": "hqq"}, ("quantization_method is", "nf4, fp4 or llm.int8")),
        ({"load_in_4bit": True}, ("load_in_4bit is true", "Axolotl: true, TRL: false")),
    ],
)
def test_what_is_refused(settings, words):
    line = fault(settings)
    assert all(word in line for word in words), line


def adapter_of(recorded: QuantisationScheme | None) -> str:
    folder = Path("adapter")
    folder.mkdir()
    facts = {"num_tokens": 5} | ({QUANTISATION: recorded.to_json()} if recorded else {})
    (folder / FACTS_FILE).write_text(json.dumps(facts))
    return str(folder)


def test_an_adapter_brings_its_base():
    path = adapter_of(QuantisationScheme(algorithm="fp4", block_size=128))
    assert scheme({"lora_path": path}) == QuantisationScheme(algorithm="fp4", block_size=128)
    assert parse({"lora": True, "lora_path": path}).warnings == ()


def test_another_base_than_the_adapters_is_said():
    path = adapter_of(NF4)
    told = parse({"lora": True, "lora_path": path, "weight_quantize_algo": "off"})
    assert scheme_of(vars(told.model)) is None
    assert told.warnings == (
        "the adapter in lora_path was trained over a base in nf4 in blocks of 64, and this run has "
        "weight_quantize_algo off",
    )
    assert not parse({"lora": True, "lora_path": path, "weight_quantize_algo": "nf4"}).warnings


def test_an_adapter_without_a_record_leaves_the_base_alone():
    path = adapter_of(None)
    assert scheme({"lora_path": path}) is None
    (line,) = parse({"lora": True, "lora_path": path, "weight_quantize_algo": "nf4"}).warnings
    assert "a base that was not quantised" in line


@pytest.mark.parametrize(
    ("settings", "command"),
    [
        ({"do_ptq": True, "ptq_step": 16}, "--quantize int8 --perplexity_data data`"),
        (
            {"do_ptq": True, "quant_type": "weight_only_int8", "smooth": True},
            "--quantize int8 --perplexity_data data`",
        ),
        ({"do_ptq": True, "quant_type": "weight_only_int4"}, "--quantize int4 --perplexity_data data`"),
        ({"do_gptq": True, "gptq_step": 8}, "--quantize int4 --calibration_data data`"),
        (
            {"do_gptq": True, "lora": True, "lora_path": "my own"},
            "--lora_path 'my own' --output_path out --quantize int4",
        ),
    ],
)
def test_files_for_quantising_after_training_are_answered_with_the_command(settings, command):
    paths = {"model_name_or_path": "model", "dataset_name_or_path": "data", "output_dir": "out"}
    with pytest.raises(UserError) as caught:
        parse(paths | settings)
    (found,) = (each for each in caught.value.faults if each.startswith("do_"))
    assert "`python export_model.py --model_name_or_path model " in found
    assert command in found
    assert not any("nothing to do" in each for each in caught.value.faults)
