"""Layouts of processes, and what is said before any of them meet."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.data.preference.sample import PreferenceSample
from finetune.errors import UserError
from finetune.families.family import families, get_family
from finetune.families.tiny_recipe import TinyShape
from finetune.machine import device
from finetune.models.resolve import ResolvedModel
from finetune.processes.layout import Coordinates, Layout, split_processes
from finetune.processes.topology import describe_layout, nearest_layouts
from finetune.run.alignment import build_preference_rows
from finetune.run.layout import check_topology, layout_of, sharding_stage
from finetune.settings.arguments import Arguments, parse_arguments
from tests.families.cases import FACTS

VALID = {
    "model_name_or_path": "owner/model",
    "dataset_name_or_path": "data",
    "output_dir": "out",
    "do_train": True,
}
SHAPE = TinyShape(
    hidden_size=64,
    intermediate_size=96,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    vocab_size=320,
    max_length=64,
)


@pytest.fixture(autouse=True)
def in_a_folder_with_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device, "has_gpu_build", lambda: False)
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "1")
    (tmp_path / "data").mkdir()


def arguments(**settings) -> Arguments:
    Path("args.json").write_text(json.dumps(VALID | settings), encoding="utf-8")
    return parse_arguments(["args.json"])


def resolved(family: str = "llama", **sizes) -> ResolvedModel:
    record = get_family(family)
    return ResolvedModel(None, "owner/model", record.tiny.config(SHAPE) | sizes, record)


def faults_of(layout: Layout, model: ResolvedModel, **settings) -> list[str]:
    vocab_size = settings.pop("vocab_size", None)
    with pytest.raises(UserError) as caught:
        check_topology(layout, model, arguments(**settings), vocab_size=vocab_size)
    return list(caught.value.faults)


# Degrees


@pytest.mark.parametrize("layout", [Layout(), Layout(2, 3, 4, 5), Layout(data=3, tensor=2)])
def test_ranks_and_coordinates_are_inverse(layout):
    places = [layout.coordinates(rank) for rank in range(layout.world)]
    assert [layout.rank(place) for place in places] == list(range(layout.world))
    assert len(set(places)) == layout.world
    shares = [layout.data_rank(rank) for rank in range(layout.world)]
    assert sorted(shares) == sorted(list(range(layout.data_world)) * (layout.world // layout.data_world))


def test_tensor_ranks_are_neighbours_and_data_ranks_far_apart():
    layout = Layout(2, 2, 2, 2)
    assert layout.coordinates(1) == Coordinates(data=0, pipeline=0, sharding=0, tensor=1)
    assert layout.coordinates(2) == Coordinates(data=0, pipeline=0, sharding=1, tensor=0)
    assert layout.coordinates(4) == Coordinates(data=0, pipeline=1, sharding=0, tensor=0)
    assert layout.coordinates(8) == Coordinates(data=1, pipeline=0, sharding=0, tensor=0)


@pytest.mark.parametrize(
    ("num_processes", "settings", "layout"),
    [
        (1, {}, Layout()),
        (4, {}, Layout(data=4)),
        (8, {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2}, Layout(2, 2, 1, 2)),
        (8, {"tensor_parallel_degree": 2, "sharding": "stage1"}, Layout(1, 1, 4, 2)),
        (8, {"sharding": "stage2", "sharding_parallel_degree": 2}, Layout(4, 1, 2, 1)),
        (8, {"sharding": "stage2", "sharding_parallel_degree": 1}, Layout(data=8)),
        (4, {"tensor_parallel_degree": -1, "pipeline_parallel_degree": 0}, Layout(data=4)),
    ],
)
def test_processes_are_spread_over_the_axes(num_processes, settings, layout, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(num_processes))
    assert layout_of(arguments(**settings), num_processes) == layout


def test_processes_that_cannot_be_shared_out(monkeypatch):
    assert split_processes(6, tensor=4, pipeline=1, sharding=-1, sharded=False) is None
    assert split_processes(6, tensor=2, pipeline=1, sharding=2, sharded=True) is None
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    with pytest.raises(UserError, match=r"tensor_parallel_degree 4 .* does not divide the 6 processes"):
        layout_of(arguments(tensor_parallel_degree=4), 6)


@pytest.mark.parametrize(("words", "stage"), [("", 0), ("stage1", 1), ("stage2", 2), ("stage3", 3)])
def test_sharding_stage(words, stage):
    assert sharding_stage(arguments(sharding=words)) == stage


# Checks

# family -> (name of a size, a value that 2 does not divide as needed)
GATED_SIZES = [("num_attention_heads", 5), ("num_key_value_heads", 1), ("intermediate_size", 97)]
ODD_SIZES = {
    name: [size for size in GATED_SIZES if size[0] in family.parallel.tensor_divides]
    for name, family in families().items()
} | {
    "qwen": [("intermediate_size", 94), ("vocab_size", 321)],
    "chatglm2": [("multi_query_group_num", 1), ("ffn_hidden_size", 97), ("vocab_size", 321)],
    "bloom": [("n_head", 5), ("vocab_size", 321)],
    "opt": [("intermediate_size", 97), ("vocab_size", 321), ("word_embed_proj_dim", 33)],
}


@pytest.mark.parametrize("family", ODD_SIZES)
def test_sizes_that_fit(family):
    for layout in (Layout(), Layout(2, 2, 1, 2), Layout(1, 4, 1, 4), Layout(tensor=8)):
        check_topology(layout, resolved(family), arguments())


@pytest.mark.parametrize(
    ("family", "name", "size"), [(family, *each) for family, sizes in ODD_SIZES.items() for each in sizes]
)
def test_sizes_that_tensor_parallelism_cannot_split(family, name, size):
    first, last = faults_of(Layout(tensor=2), resolved(family, **{name: size}))
    assert (
        f"tensor_parallel_degree is 2 but must divide {'half of ' * (size == 94)}{name}, which is {size}"
        in first
    )
    assert last.startswith("layouts of 2 processes that fit, the nearest first: tensor 1 x ")
    check_topology(Layout(), resolved(family, **{name: size}), arguments())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_families_that_keep_an_odd_vocabulary_whole(family):
    check_topology(Layout(tensor=2), resolved(family, vocab_size=321), arguments())


def test_added_tokens_count():
    check_topology(Layout(tensor=2), resolved("bloom"), arguments(), vocab_size=322)
    fault = faults_of(Layout(tensor=2), resolved("bloom"), vocab_size=321)[0]
    assert "vocab_size, which is 321 in this model with its added tokens" in fault


def test_all_faults_and_the_nearest_layouts_are_told(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "15")
    faults = faults_of(Layout(1, 5, 1, 3), resolved(), tensor_parallel_degree=3, pipeline_parallel_degree=5)
    assert [fault.split(" but ")[0] for fault in faults[:3]] == [
        "tensor_parallel_degree is 3",
        "tensor_parallel_degree is 3",
        "pipeline_parallel_degree is 5",
    ]
    assert faults[-1] == (
        "layouts of 15 processes that fit, the nearest first: "
        "tensor 1 x pipeline 3 x sharding 1 x data 5; tensor 1 x pipeline 1 x sharding 1 x data 15"
    )


def test_layers_need_not_divide_but_must_be_enough():
    check_topology(Layout(pipeline=3), resolved(), arguments())
    check_topology(Layout(pipeline=2), resolved(), arguments(virtual_pp_degree=2))
    fault = faults_of(Layout(pipeline=2), resolved(), virtual_pp_degree=3)[0]
    assert "pipeline_parallel_degree is 2 x virtual_pp_degree 3 but this model has 4 layers" in fault


PIPELINE, TENSOR = Layout(pipeline=2), Layout(tensor=2)
METHOD_FAULTS = [
    (
        PIPELINE,
        {"do_eval": True, "eval_with_do_generation": True},
        "not generated over 2 pipeline stages: train with eval_with_do_generation false",
        "tensor 2 x pipeline 1",
    ),
    (Layout(data=2), {"virtual_pp_degree": 2}, "virtual_pp_degree is 2, but pipeline_parallel", "pipeline 2"),
    (Layout(data=2), {"sequence_parallel": True}, "sequence_parallel is true, but tensor_para", "tensor 2"),
]


@pytest.mark.parametrize(("layout", "settings", "said", "nearest"), METHOD_FAULTS)
def test_methods_that_a_layout_rules_out(layout, settings, said, nearest):
    first, last = faults_of(layout, resolved(), **settings)
    assert said in first
    assert nearest in last.split(": ")[1].split(";")[0]


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        (PIPELINE, {"lora": True, "pissa": True}),
        (TENSOR, {"lora": True, "pissa": True}),
        (TENSOR, {"do_eval": True, "eval_with_do_generation": True}),
        (PIPELINE, {"eval_with_do_generation": True}),
        (TENSOR, {"sequence_parallel": True}),
        (TENSOR, {"prefix_tuning": True}),
    ],
)
def test_methods_that_fit(layout, settings):
    check_topology(layout, resolved(), arguments(**settings))


def test_sequence_parallelism_of_families_and_methods():
    able = {name for name, record in families().items() if record.sequence_parallel}
    assert able == {name for name, facts in FACTS.items() if facts.splits_rows}
    (fault,) = faults_of(TENSOR, resolved("opt"), sequence_parallel=True)
    assert "the layers of family opt cannot split rows: set it to false" in fault
    generates = {"do_eval": True, "eval_with_do_generation": True}
    check_topology(TENSOR, resolved(), arguments(sequence_parallel=True, prefix_tuning=True, **generates))


def test_no_layout_fits():
    odd = resolved(num_attention_heads=3, num_key_value_heads=3)
    faults = faults_of(Layout(data=2), odd, sequence_parallel=True)
    assert faults[-1].startswith("no layout of 2 processes fits this model and method")


def test_nearest_layouts_keep_the_degrees_that_can_stay():
    found = nearest_layouts(
        Layout(tensor=8, pipeline=2), lambda each: each.tensor <= 2 and each.pipeline <= 4, sharded=False
    )
    assert found == [Layout(2, 4, 1, 2), Layout(4, 2, 1, 2), Layout(4, 4, 1, 1)]
    sharded = nearest_layouts(Layout(sharding=4, tensor=2), lambda each: each.tensor == 1, sharded=True)
    # A pipeline keeps a rank's part of the model as small as it was.
    assert sharded[:2] == [Layout(pipeline=2, sharding=4), Layout(data=2, pipeline=2, sharding=2)]


def test_of_equally_near_layouts_the_one_with_more_tensor_parts_comes_first():
    found = nearest_layouts(Layout(tensor=2, pipeline=2), lambda each: True, sharded=False, limit=9)
    assert found == [
        Layout(tensor=2, pipeline=2),
        *(Layout(tensor=4), Layout(pipeline=4)),
        *(Layout(data=2, tensor=2), Layout(data=2, pipeline=2)),
        Layout(data=4),
    ]


def test_of_equally_near_layouts_the_one_with_fewer_replicas_comes_next():
    def is_whole(layout: Layout) -> bool:
        return layout.tensor == layout.pipeline == 1

    found = nearest_layouts(Layout(sharding=4, tensor=2), is_whole, sharded=True, limit=9)
    # One doubling and one halving of the sharding axis are as far.
    nearest, far = Layout(data=2, sharding=4), Layout(data=8)
    assert found == [nearest, Layout(sharding=8), Layout(data=4, sharding=2), far]


# Table


def test_the_table_of_a_small_layout():
    assert describe_layout(Layout(2, 1, 1, 2), [1_234_567, 1_234_567, 999, 12_345]) == (
        "Layout of 4 processes: tensor 2 x pipeline 1 x sharding 1 x data 2\n"
        "  rank  data  pipeline  sharding  tensor          parameters\n"
        "     0     0         0         0       0  1.23 M (1,234,567)\n"
        "     1     0         0         0       1  1.23 M (1,234,567)\n"
        "     2     1         0         0       0                 999\n"
        "     3     1         0         0       1              12,345"
    )


def test_the_table_tells_how_much_each_rank_updates():
    lines = describe_layout(Layout(sharding=2), [900, 900], [500, 400]).splitlines()
    assert lines[1].split() == ["rank", "data", "pipeline", "sharding", "tensor", "parameters", "updated"]
    assert [line.split()[-2:] for line in lines[2:]] == [["900", "500"], ["900", "400"]]


def test_long_tables_are_shortened():
    assert len(describe_layout(Layout(data=16)).splitlines()) == 18
    lines = describe_layout(Layout(data=32, tensor=2)).splitlines()
    assert len(lines) == 19
    assert lines[-2].split() == ["...", "(48", "more", "ranks)"]
    assert lines[-1].split() == ["63", "31", "0", "0", "1"]


# Packed rows


def test_packed_rows_that_fused_attention_would_mix_are_refused():
    """Every shipped family has been looked at; a new one must not leak between samples before it has."""
    model = resolved("opt")
    unknown = replace(model, family=replace(model.family, name="new", fused_packing="refused"))
    run = arguments(zero_padding=True)
    run.model.use_flash_attention = True  # set afterwards: on CPU it is turned off
    with pytest.raises(UserError, match=r"zero_padding are both true.*family new: set one of them to false"):
        check_topology(Layout(), unknown, run)
    check_topology(Layout(), model, run)
    run.data.zero_padding = False
    check_topology(Layout(), unknown, run)


@pytest.mark.parametrize("family", ["llama", "chatglm"])
def test_orpo_counts_no_prompt_that_sees_what_it_would_predict(family):
    run = arguments(loss_type="orpo")
    samples = [PreferenceSample(np.arange(5), (np.arange(3), np.arange(2)))]
    rows = build_preference_rows(run, samples, resolved(family), padding={"pad_token_id": 0})
    num_prompt = 0 if get_family(family).sees_ahead else 4
    assert FACTS[family].sees_ahead is get_family(family).sees_ahead
    assert rows.count_label_tokens(np.arange(1)) == num_prompt + 5
    assert rows.count_learned_tokens(np.arange(1)) == num_prompt + 3


@pytest.mark.parametrize("family", families())
def test_every_family_says_how_fused_attention_keeps_samples_apart(family):
    record, config = get_family(family), resolved(family).config
    rows = {"half": True, "has_prefix": False}
    assert record.packed_mask(config, fused=False, **rows) == "block"
    facts = FACTS[family]
    if record.distance_option:
        config = config | {record.distance_option: facts.adds_distances}
    takes_rows = not (facts.adds_distances or facts.caps_scores or facts.sees_ahead)
    expected = "start_end" if takes_rows else "block"
    assert record.packed_mask(config, fused=True, **rows) == expected
    for change in ({"half": False}, {"has_prefix": True}):  # what FlashMask cannot do
        assert record.packed_mask(config, fused=True, **rows | change) == "block"
    if record.distance_option:
        assert record.packed_mask(config | {record.distance_option: True}, fused=True, **rows) == "block"
