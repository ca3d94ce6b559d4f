"""Every fault of an argument set, by its message."""

import math

import pytest

from finetune.errors import UserError
from finetune.settings.arguments import parse_arguments
from finetune.settings.registry import foreign_settings, known_settings

pytestmark = pytest.mark.usefixtures("in_a_folder_with_data")
REFUSED = {
    name: setting.working
    for settings in (foreign_settings(), known_settings())
    for name, setting in settings.items()
    if setting.group in ("foreign", "quant") and setting.working is not None
}
VALID = [
    "--model_name_or_path",
    "owner/model",
    "--dataset_name_or_path",
    "data",
    "--output_dir",
    "out",
    "--do_train",
]


def faults_of(*words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_arguments([*VALID, *words])
    return list(caught.value.faults)


def only_fault_of(*words: str) -> str:
    faults = faults_of(*words)
    assert len(faults) == 1, faults
    assert "\n" not in faults[0]
    return faults[0]


def test_the_base_of_these_tests_has_no_fault():
    assert parse_arguments(VALID).warnings == ()


def test_nothing_given_names_everything_required():
    with pytest.raises(UserError) as caught:
        parse_arguments([])
    starts = [fault.split(":")[0] for fault in caught.value.faults]
    assert starts == [
        "model_name_or_path is missing",
        "output_dir is missing",
        "dataset_name_or_path is missing",
        "nothing to do",
    ]


def test_all_faults_are_reported_at_once():
    faults = faults_of(
        *[
            "--lora_rnk",
            "4",
            "--learning_rate",
            "abc",
            "--src_length",
            "4096",
            "--top_p",
            "2",
            "--lora",
            "--prefix_tuning",
        ]
    )
    text = "\n".join(faults)
    assert len(faults) == 5
    for part in ("lora_rnk", "learning_rate", "src_length 4096", "top_p is 2", "prefix_tuning are both true"):
        assert part in text


def test_a_value_of_the_wrong_type_brings_no_further_fault():
    fault = only_fault_of(*["--src_length", "abc", "--max_length", "512"])
    assert fault == 'src_length is "abc" on the command line: a whole number is needed, for example 1024'


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--lora_rnk 4", ['unknown setting "lora_rnk" on the command line', 'did you mean "lora_rank"?']),
        ("--max_step 20", ['did you mean "max_steps"?']),
        ("--intoken true", ['did you mean "intokens"?']),
        ("--zzqqxx 1", ['unknown setting "zzqqxx"', "see --help-all"]),
        ("--src_length 2048", ["src_length 2048 leaves no room", "max_length 2048", "lower src_length"]),
        ("--src_length 3000", ["src_length 3000 leaves no room"]),
        ("--lora --prefix_tuning", ["lora and prefix_tuning are both true", "--prefix_tuning false"]),
        ("--rslora", ["rslora is true, but lora is false", "--lora true"]),
        ("--pissa", ["pissa is true, but lora is false"]),
        ("--vera --use_dora", ["vera is true and use_dora is true, which VeRA does not have"]),
        (
            "--lora --init_lora_weights pissa_niter_N",
            ['init_lora_weights is "pissa_niter_N"', "pissa_niter_N, olora"],
        ),
        (
            "--lora --use_dora --init_lora_weights pissa_niter_4",
            ["use_dora is true, but the weights start from parts"],
        ),
        ("--vera --lokr", ["vera and lokr are both true"]),
        ("--lokr --lora_dropout 0.1", ["lokr is true and lora_dropout is 0.1, which LoKr does not have"]),
        ("--lokr --lokr_factor 0", ["lokr_factor is 0"]),
        ("--vera --lora_plus_scale 4", ["vera is true and lora_plus_scale is 4.0"]),
        ("--fp16 --bf16", ["fp16 and bf16 are both true", "--fp16 false"]),
        ("--fp16_full_eval --bf16_full_eval", ["fp16_full_eval and bf16_full_eval are both true"]),
        ("--modules_to_save lm_head", ["modules_to_save is given, but lora is false", "--lora true"]),
        ("--save_to_aistudio", ["aistudio_repo_id is missing"]),
        ("--do_train false", ["nothing to do", "set do_train or do_eval to true"]),
        ("--lr_scheduler_type cosin", ["lr_scheduler_type", "choose one of linear, cosine, constant"]),
        ("--evaluation_strategy sometimes", ["evaluation_strategy", "choose one of no, steps, epoch"]),
        ("--save_strategy sometimes", ["save_strategy", "choose one of no, steps, epoch"]),
        ("--optim sgd", ["optim", "choose one of adamw"]),
        ("--fp16_opt_level O3", ["fp16_opt_level", "O0, O1, O2"]),
        ("--recompute_granularity half", ["recompute_granularity", "full, full_attn, core_attn"]),
        ("--report_to mlfow", ["report_to", "visualdl, wandb"]),
        ("--sharding stage4", ['sharding is "stage4"', "choose stage1, stage2 or stage3"]),
        ("--sharding offload", ['sharding is "offload"']),
        ("--device gpu", ['device is "gpu"', "--device cpu"]),
        ("--device cuda", ['device is "cuda"', "choose one of cpu, gpu"]),
    ],
)
def test_single_faults(words, parts):
    fault = only_fault_of(*words.split())
    for part in parts:
        assert part in fault


OUT_OF_RANGE = [
    ("per_device_train_batch_size", "0", "at least 1"),
    ("per_device_eval_batch_size", "0", "at least 1"),
    ("gradient_accumulation_steps", "0", "at least 1"),
    ("learning_rate", "-1e-5", "at least 0"),
    ("lora_rank", "0", "at least 1"),
    ("lora_alpha", "0", "more than 0"),
    ("lora_dropout", "1", "from 0 to below 1"),
    ("lora_dropout", "-0.1", "from 0 to below 1"),
    ("warmup_ratio", "1.5", "from 0 up to 1"),
    ("top_p", "0", "above 0 up to 1"),
    ("top_p", "1.01", "above 0 up to 1"),
    ("top_k", "-2", "at least 0"),
    ("temperature", "0", "more than 0"),
    ("num_prefix_tokens", "0", "at least 1"),
    ("neftune_noise_alpha", "0", "more than 0"),
    ("num_train_epochs", "0", "more than 0"),
    ("max_steps", "-2", "at least -1"),
    ("seed", "-1", "from 0 up to 4294967295"),
    ("logging_steps", "0", "at least 1"),
    ("save_steps", "0", "at least 1"),
    ("max_new_tokens", "0", "at least 1"),
    ("pad_to_multiple_of", "0", "at least 1"),
    ("tensor_parallel_degree", "-2", "at least -1"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), OUT_OF_RANGE)
def test_values_outside_their_range(name, value, allowed):
    fault = only_fault_of(f"--{name}", value)
    assert fault.startswith(f"{name} is {value.rstrip('0') if '.' in value else value.removesuffix('e-5')}")
    assert f"it must be {allowed}" in fault


def test_every_number_has_a_range_with_finite_bounds_that_allows_its_default():
    for name, setting in known_settings().items():
        is_number = setting.type in ("int", "float")
        assert is_number == (setting.range is not None), name
        if setting.range is not None:
            assert -math.inf < setting.range.low < setting.range.high < math.inf, name
            assert setting.default is None or setting.range.find_fault(name, setting.default) is None


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("learning_rate", "1e308", "at most 100"),
        ("max_steps", str(10**30), "at most 1000000000"),
        ("lora_rank", "65537", "at most 65536"),
        ("temperature", "1e7", "at most 1000000"),
    ],
)
def test_numbers_that_nobody_means(name, value, allowed):
    assert f"it must be {allowed}" in only_fault_of(f"--{name}", value)


@pytest.mark.parametrize(
    "edge", ["--lora_dropout 0", "--warmup_ratio 1", "--top_p 1", "--top_k 0", "--learning_rate 0"]
)
def test_the_edge_of_a_range_is_allowed(edge):
    parse_arguments([*VALID, *edge.split()])


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name_or_path", "lora_path", "prefix_path"])
@pytest.mark.parametrize("value", ["./absent", "/absent", "~/absent-folder-of-nobody", "a/b/c"])
def test_missing_paths(name, value):
    fault = only_fault_of(f"--{name}", value, "--lora")
    assert fault.startswith(f'{name} is "') and "does not exist" in fault and "check the path" in fault


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name_or_path", "tokenizer_name_or_path"])
def test_hub_names_are_left_to_the_loading_step(name):
    parse_arguments([*VALID, f"--{name}", "owner/name"])


def test_missing_checkpoint_and_template():
    assert "leave it out to continue" in only_fault_of("--resume_from_checkpoint", "checkpoint-7")
    assert 'chat_template is "./absent.json"' in only_fault_of("--chat_template", "./absent.json")


def test_a_template_given_as_text_is_no_path():
    parse_arguments([*VALID, "--chat_template", "<s>{{ text }}</s>/{{ end }}/"])


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    assert "which is a file" in only_fault_of("--output_dir", "taken")


BEST = ["--load_best_model_at_end", "--evaluation_strategy", "steps", "--save_strategy", "steps"]


@pytest.mark.parametrize("metric", ["bleu4", "eval_rougel", "rouge1", "f1"])
def test_metric_that_evaluation_by_loss_cannot_produce(metric):
    fault = only_fault_of("--metric_for_best_model", metric)
    assert metric in fault and "evaluation by loss" in fault and "loss, perplexity, accuracy" in fault


@pytest.mark.parametrize("metric", ["accuracy", "loss", "eval_ppl"])
def test_metric_that_evaluation_by_generation_cannot_produce(metric):
    fault = only_fault_of("--metric_for_best_model", metric, "--eval_with_do_generation")
    assert "evaluation by generation" in fault and "bleu4, rouge1, rouge2, rougel" in fault


def test_best_model_needs_equal_strategies():
    fault = only_fault_of(*BEST, "--save_strategy", "epoch")
    assert "evaluation_strategy is steps and save_strategy is epoch" in fault
    fault = only_fault_of("--load_best_model_at_end")
    assert "evaluation_strategy is no and save_strategy is steps" in fault


def test_best_model_needs_saves_at_evaluations():
    fault = only_fault_of(*BEST, "--save_steps", "30", "--eval_steps", "20")
    assert "they are 30 and 20" in fault
    parse_arguments([*VALID, *BEST, "--save_steps", "40", "--eval_steps", "20"])
    # eval_steps comes from logging_steps when it is not given
    assert "they are 30 and 7" in only_fault_of(*BEST, "--save_steps", "30", "--logging_steps", "7")


STREAM = ["--lazy", "--max_steps", "10"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--lazy"], "max_steps is missing: a stream has no known length"),
        ([*STREAM, "--save_strategy", "epoch"], "save_strategy is epoch, but with lazy true"),
        ([*STREAM, "--evaluation_strategy", "epoch"], "set it to steps, with eval_steps"),
        ([*STREAM, "--validation_split", "0.1"], "validation_split is 0.1, but with lazy true"),
        ([*STREAM, "--max_train_samples", "5"], "max_steps bounds the training"),
        ([*STREAM, "--shuffle_buffer_size", "0"], "shuffle_buffer_size is 0: it must be at least 1"),
    ],
)
def test_what_a_stream_cannot_do(words, part):
    assert part in only_fault_of(*words)


def test_a_stream_that_only_evaluates_needs_nothing_more():
    parse_arguments([*VALID, *STREAM])
    parse_arguments([*VALID, "--lazy", "--do_train", "false", "--do_eval"])


@pytest.mark.parametrize("name", REFUSED)
def test_settings_of_later_scripts_are_refused_by_name(name):
    value = {
        "continue_training": "false",
        "rope_scaling_factor": "2.0",
        "quant_type": "weight_only_int8",
    }.get(name)
    if value is None:
        value = (
            "nf4"
            if name in ("weight_quantize_algo", "strategy_type", "strategy_name", "lokr_path")
            else "true"
        )
    fault = only_fault_of(f"--{name}", value)
    assert fault.startswith(f"{name} is ")
    assert "which this version does not have" in fault
    assert f"remove {name}" in fault


@pytest.mark.parametrize("name", REFUSED)
def test_their_off_values_are_accepted(name):
    for value in REFUSED[name] or (None,):
        word = "null" if value is None else str(value)
        assert parse_arguments([*VALID, f"--{name}", word]).warnings == ()


def test_settings_without_effect_are_named_once_and_accepted():
    warnings = parse_arguments(
        [*VALID, "--greedy_zero_padding", "--pad_to_max_length", "--ptq_step", "16"]
    ).warnings
    assert [warning.split()[0] for warning in warnings] == ["greedy_zero_padding", "pad_to_max_length"]


def test_a_setting_has_a_place_here_or_none_and_is_refused_or_ignored():
    assert not foreign_settings().keys() & known_settings().keys()
    for name, setting in foreign_settings().items():
        assert (setting.working is None) == bool(setting.ignored) != bool(setting.instead), name
    for name, setting in known_settings().items():
        assert (setting.working is None) == (not setting.instead), name
        assert not (setting.ignored and setting.instead), name


# Data


@pytest.mark.parametrize(
    ("mixed", "message"),
    [
        ("[]", "dataset_mix is empty: give at least one"),
        ("[{}]", "dataset_mix[0]: path is missing"),
        ('[{"path": "absent"}]', 'dataset_mix[0]: path is "absent", which does not exist'),
        ('[{"path": "data", "weight": 2}]', 'dataset_mix[0]: unknown key "weight", allowed are path, ratio and max_samples'),
        ('[{"path": "data", "ratio": 0}]', "dataset_mix[0]: ratio is 0: it must be a number above 0"),
        ('[{"path": "data", "ratio": "1"}]', 'dataset_mix[0]: ratio is "1": it must be a number above 0'),
        ('[{"path": "data", "max_samples": 0.5}]', "dataset_mix[0]: max_samples is 0.5: it must be a whole number"),
        ('[{"path": "data", "max_samples": true}]', "dataset_mix[0]: max_samples is true: it must be a whole number"),
        ('[{"path": "data", "ratio": 1}, {"path": "data"}]', "dataset_mix[1] has no ratio, but others have"),
        ("[5]", "a list of objects, as JSON on the command line, is needed"),
        ("data", "a list of objects, as JSON on the command line, is needed"),
        ("[{", "is needed"),
    ],
)  # fmt: skip
def test_dataset_mix(mixed, message):
    assert message in only_fault_of("--dataset_mix", mixed)


def test_dataset_mix_stands_in_for_a_dataset():
    mixed = '[{"path": "data", "ratio": 0.5, "max_samples": 3}]'
    arguments = parse_arguments([*VALID[:2], *VALID[4:], "--dataset_mix", mixed])
    assert arguments.data.dataset_mix == [{"path": "data", "ratio": 0.5, "max_samples": 3}]
    assert arguments.to_json()["dataset_mix"] == arguments.data.dataset_mix


def test_several_data_sets_with_commas(tmp_path):
    (tmp_path / "more.csv").write_text("")
    assert parse_arguments([*VALID, "--dataset_name_or_path", "data, more.csv"])
    fault = only_fault_of("--dataset_name_or_path", "data,less.csv")
    assert fault.startswith('dataset_name_or_path is "less.csv", which does not exist')


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--validation_split", "0"), "validation_split is 0.0: it must be more than 0"),
        (("--validation_split", "1.5"), "validation_split is 1.5: it must be a ratio below 1, such as 0.1, or a whole"),
        (("--max_train_samples", "0"), "max_train_samples is 0: it must be at least 1"),
        (("--max_eval_samples", "-2"), "max_eval_samples is -2: it must be at least 1"),
        (("--self_cognition_samples", "-1"), "self_cognition_samples is -1: it must be at least 0"),
        (("--self_cognition_samples", "5", "--model_name", "x"), "self_cognition_samples is 5, but model_author is missing"),
        (("--self_cognition_file", "absent.json"), 'self_cognition_file is "absent.json", which is no file'),
        (("--truncation", "middle"), "choose one of left, right, drop, error"),
        (("--train_on", "first"), "choose one of all, last"),
        (("--on_bad_line", "ignore"), "choose one of error, skip"),
        (("--preference", "rejected"), "choose one of chosen"),
        (("--dataset_format", "xml"), "choose one of src_tgt, alpaca, query_response, messages, sharegpt, text"),
    ],
)  # fmt: skip
def test_data_settings(words, message):
    assert message in only_fault_of(*words)


@pytest.mark.parametrize("split", ["0.1", "1", "200"])
def test_validation_split_is_a_ratio_or_a_count(split):
    assert parse_arguments([*VALID, "--validation_split", split]).data.validation_split == float(split)
