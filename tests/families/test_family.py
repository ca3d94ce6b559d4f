from dataclasses import replace

import pytest

from finetune.errors import UserError
from finetune.families import registry
from finetune.families.family import families, find_family, get_family, import_object, register
from finetune.families.llama.record import LLAMA

LLAMA_SIZES = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
}


def test_model_type_comes_before_architectures():
    assert find_family({"model_type": "llama"}) is LLAMA
    assert find_family({"architectures": ["LlamaForCausalLM"]}) is LLAMA
    with pytest.raises(UserError, match=r"no family covers model_type 'other'.*covered families: .*llama"):
        find_family({"model_type": "other", "architectures": ["LlamaForCausalLM"]})


def test_unknown_family_lists_the_families():
    with pytest.raises(UserError, match=r"unknown model family 'lama'; covered families: .*llama"):
        get_family("lama")


def test_two_families_of_one_name_are_an_error():
    with pytest.raises(ValueError, match=r"two families llama"):
        register(LLAMA)


def _has_tokens(name):
    """Covers what stands in no folder, or in one whose tokenizer has the token."""
    return lambda _config, folder: folder is None or name in (folder / "tokenizer_config.json").read_text()


@pytest.fixture
def twins(monkeypatch):
    """Two families of one model_type, told apart by the tokenizer."""
    families()
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    for name in ("left", "right"):
        family = replace(LLAMA, name=name, model_types=("twin",), covers=_has_tokens(f"<{name}>"))
        register(replace(family, told_by=f"its tokenizer has <{name}>"))


@pytest.mark.parametrize("name", ["left", "right"])
def test_families_that_share_a_model_type_are_told_apart_by_the_folder(name, twins, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(f"<{name}>")
    assert find_family({"model_type": "twin"}, tmp_path).name == name


def test_a_model_that_two_families_cover_is_refused_by_their_names(twins, tmp_path):
    message = r"model_type 'twin' .* shared by the families left \(its tokenizer has <left>\), right \("
    with pytest.raises(UserError, match=message):
        find_family({"model_type": "twin"})
    (tmp_path / "tokenizer_config.json").write_text("<left><right>")
    with pytest.raises(UserError, match=message):
        find_family({"model_type": "twin"}, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("")
    with pytest.raises(UserError, match="no family covers model_type 'twin'"):
        find_family({"model_type": "twin"}, tmp_path)


@pytest.mark.parametrize("name", sorted(families()))
def test_every_dotted_path_of_a_record_exists(name):
    family = get_family(name)
    paths = [family.model_class, family.prefix_postprocess, family.tokenizer.tokenizer_class]
    assert all(callable(import_object(path)) for path in paths)


def test_prefix_geometry_counts_key_value_heads():
    geometry = LLAMA.prefix_geometry(LLAMA_SIZES)
    assert (geometry.num_layers, geometry.num_heads, geometry.num_kv_heads, geometry.head_dim) == (4, 8, 2, 8)
    without = {key: value for key, value in LLAMA_SIZES.items() if key != "num_key_value_heads"}
    assert LLAMA.prefix_geometry(without).num_kv_heads == 8


def test_parallel_degrees_that_do_not_fit_are_named_with_the_size():
    assert LLAMA.parallel_faults(LLAMA_SIZES, tensor_degree=2, pipeline_degree=4) == []
    faults = LLAMA.parallel_faults(LLAMA_SIZES, tensor_degree=3, pipeline_degree=5)
    assert [fault.split(":")[0] for fault in faults] == [
        "tensor_parallel_degree is 3 but must divide num_attention_heads, which is 8 in this model",
        "tensor_parallel_degree is 3 but must divide num_key_value_heads, which is 2 in this model",
        "pipeline_parallel_degree is 5 but this model has 4 layers",
    ]
    assert faults[0].endswith("choose 1, 2, 4 or 8")
    assert LLAMA.parallel_faults(LLAMA_SIZES, tensor_degree=1, pipeline_degree=2, virtual_degree=2) == []
    (fault,) = LLAMA.parallel_faults(LLAMA_SIZES, tensor_degree=1, pipeline_degree=3, virtual_degree=2)
    assert "pipeline_parallel_degree is 3 x virtual_pp_degree 2 but this model has 4 layers" in fault


ROPE_CASES = [
    ({"rope_theta": 7.0}, {"rope_theta": 7.0}),
    ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
    (
        {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 7.0, "rope_scaling_type": "linear", "rope_scaling_factor": 2.0},
    ),
    (
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    ),
    ({"rope_scaling": None}, {}),
]


@pytest.mark.parametrize(("found", "adapted"), ROPE_CASES)
def test_rotary_settings_go_where_paddlenlp_reads_them(found, adapted):
    before = repr(found)
    assert LLAMA.adapt_config(found) == adapted
    assert repr(found) == before


def test_rotary_scaling_that_cannot_be_expressed_is_refused():
    with pytest.raises(
        UserError, match=r"rotary scaling 'longrope'.*allowed: none, linear, dynamic, llama3, yarn"
    ):
        LLAMA.adapt_config({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}})


def test_other_head_size_is_refused():
    with pytest.raises(UserError, match=r"head_dim 16 with 8 heads"):
        get_family("qwen2").adapt_config({**LLAMA_SIZES, "head_dim": 16})


LONGEST = [
    ("llama", {}, 64),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, 256),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "attention_bias": True}, 256),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 256),
    ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}, 128),
    ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}, 64),
    ("mistral", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 64),
]


@pytest.mark.parametrize(("name", "settings", "expected"), LONGEST)
def test_stretched_positions_reach_as_far_as_they_are_stretched(name, settings, expected):
    """Vicuna 16k and Qwen2.5 with YaRN say the length before stretching, Llama with YaRN that behind it."""
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    }
    assert get_family(name).position_limit({"model_type": name, **sizes, **settings}) == expected
