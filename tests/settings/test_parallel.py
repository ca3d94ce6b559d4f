"""Settings of parallel training: degrees against processes, words of PaddleNLP's files, what has no effect."""

import pytest

from finetune.errors import UserError
from finetune.machine import device
from finetune.settings.arguments import parse_arguments
from finetune.settings.records import LAYOUT
from finetune.settings.registry import known_settings

pytestmark = pytest.mark.usefixtures("in_a_folder_with_data")
PARALLEL_WORDS = {name: setting.words for name, setting in known_settings().items() if setting.words}
VALID = [
    *("--model_name_or_path", "owner/model", "--dataset_name_or_path", "data"),
    *("--output_dir", "out", "--do_train"),
]


def only_fault_of(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_arguments([*VALID, *words])
    (fault,) = caught.value.faults
    assert "\n" not in fault
    return fault


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            "--tensor_parallel_degree 4",
            [
                "tensor_parallel_degree 4 needs 4 processes or a multiple, this run has 1 process",
                "`python -m paddle.distributed.launch --nproc_per_node 4 finetune_generation.py ARGS.json --device cpu`",
                "or on one process with --tensor_parallel_degree 1",
            ],
        ),
        (
            "--tensor_parallel_degree 2 --pipeline_parallel_degree 2",
            [
                "tensor_parallel_degree 2 x pipeline_parallel_degree 2 needs 4 processes",
                "--tensor_parallel_degree 1 --pipeline_parallel_degree 1",
                "--nproc_per_node 4",
            ],
        ),
        ("--sharding stage1 --sharding_parallel_degree 8", ["--sharding_parallel_degree 1"]),
        (
            "--sharding stage1 --sharding_degree 8",
            ["sharding_parallel_degree 8 needs 8 processes"],
        ),
        (
            "--sharding_parallel_degree 2",
            ["sharding_parallel_degree is 2, but sharding does not say", "--sharding stage1"],
        ),
        ("--sep_parallel_degree 2", ["sep_parallel_degree is 2", "tensor_parallel_degree with sequence"]),
        ("--context_parallel_degree 2", ["context_parallel_degree is 2", "recompute"]),
        ("--expert_parallel_degree 2", ["expert_parallel_degree is 2", "sends tokens to experts of another"]),
        ("--expert_tensor_parallel_degree 2", ["expert_tensor_parallel_degree is 2"]),
        ("--use_expert_parallel", ["use_expert_parallel is True", "leave it off"]),
        ("--offload_optim", ["offload_optim is True", "sharding spreads the optimizer state"]),
        (
            ["--sharding", "stage2 offload"],
            ['sharding is "stage2 offload"', "use stage3, raise sharding_parallel_degree"],
        ),
        (
            ["--sharding", "stage3 offload"],
            ["host memory is not available: remove offload", "recompute true"],
        ),
        (["--sharding", "stage1 stage2"], ['sharding is "stage1 stage2": choose stage1, stage2 or stage3']),
        (
            ["--pipeline_parallel_config", "disable_p2p_cache_shape disable_p2p"],
            ['of which "disable_p2p" is not known', "disable_partial_send_recv"],
        ),
        (
            ["--sharding_parallel_config", "enable_stage1_overlap,enable_stage9"],
            ['of which "enable_stage9" is not known'],
        ),
    ],
)
def test_parallel_settings_that_cannot_be(words, parts):
    fault = only_fault_of(*(words.split() if isinstance(words, str) else words))
    for part in parts:
        assert part in fault


@pytest.mark.parametrize("name", ["data_parallel_degree", "dp_degree"])
def test_replicas_have_no_degree(name):
    fault = only_fault_of(f"--{name}", "2")
    assert fault.startswith(f"{name} is 2, which") and "those that no degree claims become replicas" in fault
    assert parse_arguments([*VALID, f"--{name}", "-1"]).warnings == ()


@pytest.mark.parametrize(
    ("name", "setting"), [("mp_degree", "tensor_parallel_degree"), ("pp_degree", "pipeline_parallel_degree")]
)
def test_degrees_under_fleets_names(name, setting):
    assert f"{setting} 2 needs 2 processes" in only_fault_of(f"--{name}", "2")


def test_launch_command_on_gpus(monkeypatch):
    monkeypatch.setattr(device, "has_gpu_build", lambda: True)
    monkeypatch.setattr(device, "count_visible_gpus", lambda environ=None: 8)
    assert "--gpus 0,1 finetune_generation.py" in only_fault_of("--tensor_parallel_degree", "2")
    fault = only_fault_of("--tensor_parallel_degree", "8", "--pipeline_parallel_degree", "2")
    assert "--nnodes 2 --gpus 0,1,2,3,4,5,6,7" in fault


def test_degrees_are_compared_with_the_number_of_processes(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    for words in (
        "",
        "--tensor_parallel_degree 2",
        "--tensor_parallel_degree 2 --pipeline_parallel_degree 2",
        "--sharding stage3",
        "--sharding stage1 --sharding_parallel_degree 2 --tensor_parallel_degree 2",
        "--sharding stage1 --sharding_parallel_degree 2",
    ):
        parse_arguments([*VALID, *words.split()])
    fault = only_fault_of("--tensor_parallel_degree", "3")
    assert "needs 3 processes or a multiple, this run has 4 processes" in fault
    assert "--nproc_per_node 3" in fault and "as 4 replicas with --tensor_parallel_degree 1" in fault
    fault = only_fault_of(
        *["--sharding", "stage1", "--sharding_parallel_degree", "4", "--tensor_parallel_degree", "2"]
    )
    assert "tensor_parallel_degree 2 x sharding_parallel_degree 4 needs 8 processes" in fault


def test_words_that_the_pipeline_does_not_obey_are_refused(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    name, degree = "--pipeline_parallel_config", ["--pipeline_parallel_degree", "2"]
    assert "1F1B" in only_fault_of(*degree, name, "use_dualpipev,enable_delay_scale_loss")
    batched = "disable_non_batch_p2p_comm"
    assert "in single messages" in only_fault_of(*degree, name, batched, "--virtual_pp_degree", "2")
    contrary = only_fault_of(*degree, name, f"{batched} disable_batch_p2p_comm")
    assert 'its contrary "disable_batch_p2p_comm": remove one of them' in contrary
    assert parse_arguments([*VALID, *degree, name, batched]).warnings == ()
    obeyed = "disable_partial_send_recv disable_batch_p2p_comm enable_overlap_p2p_comm enable_release_grads"
    assert parse_arguments([*VALID, *degree, name, obeyed]).warnings == ()


def test_sums_of_replicas_beside_a_pipeline_are_obeyed_unless_something_forbids_it(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "8")
    overlap = ["--pipeline_parallel_degree", "2", "--pipeline_parallel_config", "enable_dp_comm_overlap"]
    waits = ["--data_parallel_config", "gradient_sync_after_accumulate"]
    whole = [*overlap, "--sharding_parallel_degree", "2", "--sharding", "stage1"]
    sliced = [*whole[:-1], "stage2"]
    for words in (overlap, sliced, [*whole, "--sharding_parallel_config", "split_param"]):
        assert parse_arguments([*VALID, *words]).warnings == ()
        assert "data_parallel_config holds gradient_sync_after_accumulate" in only_fault_of(*words, *waits)
    assert "add split_param to sharding_parallel_config, or remove the word" in only_fault_of(*whole)
    assert parse_arguments([*VALID, *waits]).warnings == ()


@pytest.mark.parametrize("sharding", [[], ["--sharding", "stage1"]])
def test_overlap_with_an_axis_that_the_run_does_not_have_says_nothing(monkeypatch, sharding):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4" if sharding else "2")
    overlap = ["--pipeline_parallel_degree", "2", "--pipeline_parallel_config", "enable_dp_comm_overlap"]
    waits = ["--data_parallel_config", "gradient_sync_after_accumulate"]
    assert parse_arguments([*VALID, *overlap, *sharding, *waits]).warnings == ()


REHEARSED = ["--rehearse_half_precision", "true"]
TENSOR = ["--tensor_parallel_degree", "2", "--tensor_parallel_config"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["enable_mp_fused_linear_param_grad_add"], "no test here can run it"),
        (["replace_with_c_embedding"], "static graphs"),
        (["enable_delay_scale_loss replace_with_parallel_cross_entropy"], "static graphs"),
        (["sync_param"], "would hide the fault"),
        (["sync_grad"], "would hide the fault"),
        (["sync_moment"], "would hide the fault"),
        (["enable_mp_skip_c_identity"], "together with enable_mp_async_allreduce only: add that word, or remove"),
        (["enable_sp_async_reduce_scatter"], "sequence_parallel is false"),
        (["enable_mp_async_allreduce", "--sequence_parallel", "true"], "enable_sp_async_reduce_scatter is the word"),
        (["enable_mp_async_allreduce", "--lora", "true"], "this method trains none"),
        (["enable_mp_async_allreduce", "--prefix_tuning", "true"], "this method trains none"),
        (["enable_mp_async_allreduce", "--bf16", "true", *REHEARSED], "set fp16_opt_level O2, or remove the word"),
        (["enable_mp_async_allreduce", "--freeze_layers", "1"], "freeze_layers leaves weights untrained"),
        (
            ["enable_sp_async_reduce_scatter", "--sequence_parallel", "true", "--trainable_parameters", "norm"],
            "trainable_parameters leaves weights untrained",
        ),
    ],
)  # fmt: skip
def test_words_that_no_tensor_parallel_layer_obeys_are_refused(monkeypatch, words, reason):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    fault = only_fault_of(*TENSOR, *words)
    assert fault.startswith("tensor_parallel_config holds ") and reason in fault


def test_words_that_tensor_parallel_layers_obey_are_taken(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    for words in (
        ["enable_delay_scale_loss,enable_mp_async_allreduce enable_mp_skip_c_identity"],
        ["enable_sp_async_reduce_scatter", "--sequence_parallel", "true"],
        ["enable_mp_async_allreduce", "--bf16", "true", "--fp16_opt_level", "O2", *REHEARSED],
    ):
        assert parse_arguments([*VALID, *TENSOR, *words]).warnings == ()
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "1")  # words of an axis that the run does not have say nothing
    assert parse_arguments([*VALID, TENSOR[2], "sync_param", "--lora", "true"]).warnings == ()


def test_degrees_of_one_need_no_launcher():
    parse_arguments(
        [
            *VALID,
            *["--tensor_parallel_degree", "1", "--pipeline_parallel_degree", "1", "--sharding", "stage2"],
        ]
    )


@pytest.mark.parametrize(
    ("stage", "words", "reason"),
    [
        ("stage1", "split_param enable_fuse_optimizer_states", "optimizer state of each parameter"),
        ("stage2", "enable_overlap", "semi-automatic"),
        ("stage1", "enable_tensor_fusion", "semi-automatic"),
        ("stage2", "split_param", 'it is for stage1 and sharding is "stage2"'),
        ("stage3", "enable_stage1_overlap", 'it is for stage1 and sharding is "stage3"'),
        ("stage1", "enable_stage2_overlap", 'it is for stage2 and sharding is "stage1"'),
        ("stage3", "disable_stage1_reduce_avg", "it is for stage1"),
    ],
)
def test_words_that_sharding_does_not_obey_are_refused(stage, words, reason):
    fault = only_fault_of("--sharding", stage, "--sharding_parallel_config", words)
    assert f'sharding_parallel_config holds "{words.split()[-1]}", but' in fault and reason in fault
    assert fault.endswith("remove the word")


def test_sums_beside_computing_and_after_it_exclude_each_other(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    after = ["--data_parallel_config", "gradient_sync_after_accumulate"]
    words = ["--sharding", "stage2", "--sharding_parallel_config", "enable_stage2_overlap"]
    assert "the contrary: remove the word" in only_fault_of(*words, *after)
    name, pipeline = "enable_sharding_comm_overlap", ["--pipeline_parallel_degree", "2"]
    pipeline += ["--pipeline_parallel_config", name]
    for stage in ("stage1", "stage3"):
        fault = only_fault_of("--sharding", stage, *pipeline, *after)
        assert f'pipeline_parallel_config holds "{name}"' in fault and "the contrary" in fault
    sliced = ["--sharding", "stage1", "--sharding_parallel_config", "split_param"]
    for words in (
        ["--sharding", "stage1", *pipeline],
        ["--sharding", "stage2", *pipeline],
        [*sliced, *pipeline],
        [*sliced, *after],
        ["--sharding", "stage1", "--sharding_parallel_config", "enable_stage1_overlap enable_release_grads"],
        ["--sharding", "stage1", "--sharding_parallel_config", "disable_stage1_reduce_avg"],
    ):
        assert parse_arguments([*VALID, *words]).warnings == ()


@pytest.mark.parametrize("name", PARALLEL_WORDS)
def test_known_words_of_paddlenlp_are_accepted_in_silence(name):
    assert parse_arguments([*VALID, f"--{name}", " ".join(PARALLEL_WORDS[name])]).warnings == ()
    assert parse_arguments([*VALID, f"--{name}", ""]).warnings == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--hybrid_parallel_topo_order pp_first", None),
        ("--hybrid_parallel_topo_order sharding_first", "results do not depend on the order of the axes"),
        ("--sharding_parallel_mesh_dimension dp", None),
        ("--pp_recompute_interval 1", None),
        ("--pp_recompute_interval 2", "recompute and no_recompute_layers"),
        ("--save_sharded_model", "checkpoints here hold whole tensors"),
        ("--ckpt_quant_stage O0", None),
        ("--ckpt_quant_stage O1", "optimizer state is saved as it is"),
        ("--tensor_parallel_output true", None),
        ("--unified_checkpoint", None),
        ("--sep_parallel_degree 1 --context_parallel_degree -1 --expert_parallel_degree 1", None),
    ],
)
def test_parallel_settings_without_effect(words, said):
    warnings = parse_arguments([*VALID, *words.split()]).warnings
    if said is None:
        assert warnings == ()
    else:
        assert len(warnings) == 1
        assert warnings[0].startswith(words.split()[0].removeprefix("--")) and said in warnings[0]


def test_settings_with_words_are_those_of_parallelism():
    assert len(PARALLEL_WORDS) == 6
    assert all(known_settings()[name].readers == (LAYOUT,) for name in PARALLEL_WORDS)
