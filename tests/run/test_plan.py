"""The plan of a run: what ranks hold, what micro-batches are kept, whether it fits, and what would."""

from __future__ import annotations

import json

import numpy as np
import pytest

from finetune.adapters.trained_shapes import TrainedShapes
from finetune.commands.plan import main
from finetune.data.batches.sampler import GlobalOrder, LongestFirst
from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.families.tiny_recipe import TinyShape
from finetune.models.layers import named_weights
from finetune.models.loading import build_config, find_model_class
from finetune.models.resolve import ResolvedModel
from finetune.models.weight_shapes import weight_shapes
from finetune.parallel.pipe.stage import build_stage
from finetune.parallel.pipe.stage_plan import StagePlan
from finetune.processes.layout import Layout
from finetune.run.plan.activations import most_in_flight
from finetune.run.plan.rank_parts import divide_parameters
from finetune.run.plan.run_plan import measured_speed
from finetune.run.plan.screen import fold

SHAPE = TinyShape(
    hidden_size=48,
    intermediate_size=80,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=90,
    max_length=40,
)


@pytest.fixture
def words(tiny_llama, small_data, tmp_path):
    """Settings of a small run."""
    path = tmp_path / "arguments.json"
    settings = {
        "model_name_or_path": str(tiny_llama),
        "dataset_name_or_path": str(small_data),
        "output_dir": str(tmp_path / "out"),
        "do_train": True,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "data_cache": False,
    }
    path.write_text(json.dumps(settings))
    return [str(path)]


@pytest.fixture
def plan(words, capsys):
    """Makes a plan with further words; its exit code and its JSON."""

    def run(*more):
        code = main([*words, "--json", *map(str, more)])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "bloom", "opt", "gpt2", "chatglm2", "qwen3_moe"])
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_stages_hold_what_built_stages_hold(name, num_chunks):
    family = get_family(name)
    shape = SHAPE if family.tiny.grouped_heads else TinyShape(**vars(SHAPE) | {"num_kv_heads": 4})
    config = family.tiny.config(shape) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    resolved = ResolvedModel(None, name, config, family)
    adapted = family.adapt_config(config)
    shapes = weight_shapes(family, adapted)
    layout = Layout(pipeline=2)
    parts = divide_parameters(
        TrainedShapes(shapes, trained=frozenset(shapes)), family, adapted, layout, num_chunks=num_chunks
    )
    model_class = find_model_class(resolved)
    for rank, part in enumerate(parts):
        built_config = build_config(resolved, model_class, dtype="float32", overrides={"use_cache": False})
        stage = build_stage(model_class, built_config, family=family, plan=StagePlan(rank, 2, num_chunks))
        built = {name: int(each.size) for name, each in named_weights(stage.model).items()}
        assert dict(part.sizes) == built


def test_tensor_ranks_hold_slices_and_whole_norms():
    family = get_family("llama")
    config = family.adapt_config(family.tiny.config(SHAPE))
    shapes = TrainedShapes(weight_shapes(family, config))
    (part,) = divide_parameters(shapes, family, config, Layout(tensor=2))
    whole = {name: int(np.prod(shape)) for name, shape in shapes.model.items()}
    for name, size in part.sizes.items():
        assert size == (whole[name] if "norm" in name else whole[name] // 2)


@pytest.mark.parametrize("num_micro_batches", [1, 3, 8, 50])
def test_a_pipeline_keeps_as_many_micro_batches_as_follow(num_micro_batches):
    kept = [
        most_in_flight([1.0], num_ranks=4, rank=rank, num_micro_batches=num_micro_batches)
        for rank in range(4)
    ]
    assert kept == [min(num_micro_batches, 4 - rank) for rank in range(4)]


def test_virtual_stages_keep_more():
    plain = most_in_flight([2.0], num_ranks=2, rank=0, num_micro_batches=8)
    assert most_in_flight([1.0, 1.0], num_ranks=2, rank=0, num_micro_batches=8) > plain


def test_the_longest_rows_come_first():
    lengths = np.array([3, 9, 5, 9, 1, 7])
    order = LongestFirst(lengths, global_batch_size=2, seed=0)
    batches = [order.batch(step)[1] for step in range(5)]
    # Those of the first step twice: in the second there is optimizer state.
    assert [lengths[batch].tolist() for batch in batches] == [[9, 9], [9, 9], [7, 5], [3, 1], [9, 9]]
    assert GlobalOrder(6, global_batch_size=2, seed=0).batch(0)[1].tolist() != batches[0].tolist()


def test_a_plan_tells_everything(plan, words, capsys):
    code, found = plan("--tokens_per_second", 1000)
    assert code == 0
    assert found["steps"] == 6
    assert found["seconds"] == found["tokens"] / 1000
    assert found["trained_parameters"] == found["parameters"] > 0
    assert 0 < found["padding_share"] < 1
    assert found["fits"] is None and found["changes"] is None
    (stage,) = found["memory_per_stage"]
    parts = stage["end_of_forward"]
    assert parts["weights"] == 4 * found["parameters"] and parts["optimizer moments"] == 2 * parts["weights"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for word in (
        "Parameters:",
        "Steps: 6",
        "padding",
        "optimizer moments",
        "logits and loss",
        "Disk:",
        "Time: not known",
    ):
        assert word in text


def test_a_card_that_is_too_small_ends_with_1_and_every_change_fits(plan):
    code, found = plan("--card_memory", "1.001GB", "--per_device_train_batch_size", 32, "--device", "gpu")
    assert code == 1 and found["fits"] is False and found["changes"] == []
    # What a card itself takes leaves no room there; with less of everything else there is some.
    needed = plan("--device", "gpu")[1]["peak_bytes"]
    limit = f"{(needed - 20_000) / 0.95 / (1 << 20):.4f}MB"
    code, found = plan("--card_memory", limit, "--device", "gpu")
    assert code == 1 and found["changes"]
    for change in found["changes"]:
        more = [
            word for name, value in change["settings"].items() for word in (f"--{name}", str(value).lower())
        ]
        code, changed = plan("--card_memory", limit, "--device", "gpu", "--num_cards", change["cards"], *more)
        assert code == 0 and changed["fits"] is True, change
        assert changed["peak_bytes"] == pytest.approx(change["peak_bytes"], rel=0.01)


def test_settings_of_cards_are_planned_for_where_there_are_none(plan):
    code, found = plan("--card_memory", "24GiB", "--bf16", "true", "--tensor_parallel_degree", 2, "--sharding", "stage1",
                       "--sharding_parallel_degree", 2)  # fmt: skip
    assert code == 0 and found["device"] == "gpu"
    assert found["layout"] == {"data": 1, "pipeline": 1, "sharding": 2, "tensor": 2}
    assert len(found["parameters_per_rank"]) == 4
    assert sum(found["updated_per_rank"][rank] for rank in (0, 2)) == found["parameters_per_rank"][0]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--card_memory", "much"], "card_memory is 'much': give a size above 0"),
        (["--card_memory", "0GB"], "card_memory is '0GB'"),
        (["--num_cards", "0"], "num_cards is '0': give a whole number"),
        (["--tokens_per_second", "-3"], "tokens_per_second is '-3': give a number above 0"),
        (["--tensor_parallel_degree", "3"], "num_attention_heads"),
        (["--num_cards", "3", "--tensor_parallel_degree", "2"], "needs 2 processes or a multiple"),
        (["--do_train", "false", "--do_eval", "true"], "do_train is false: a plan is made of a training"),
        (
            ["--longest_first", "2", "--do_train", "false", "--do_eval", "true"],
            "longest_first is 2, but do_train",
        ),
        (["--longest_first", "2", "--lazy", "true"], "longest_first is 2, but with lazy true"),
    ],
)
def test_refusals(words, more, told):
    with pytest.raises(UserError) as caught:
        main([*words, *more])
    assert any(told in fault for fault in caught.value.faults)


def test_the_speed_of_an_earlier_run_on_the_same_kind_of_device(tmp_path):
    assert measured_speed(tmp_path, "cpu") is None
    (tmp_path / "arguments.json").write_text('{"device": "cpu"}')
    rows = [{"kind": "train", "tokens_per_second": speed} for speed in (1, 90, 100, 110)]
    (tmp_path / "train_log.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr'
    )
    assert measured_speed(tmp_path, "cpu") == 100
    assert measured_speed(tmp_path, "gpu") is None
    (tmp_path / "all_results.json").write_text('{"train_tokens_per_second": 95.5}')
    assert measured_speed(tmp_path, "cpu") == 95.5


def test_long_lines_go_on_below():
    folded = list(fold(["  a" + " word" * 30, "short"]))
    assert len(folded) == 3 and max(map(len, folded)) <= 80 and folded[1].startswith("    word")
