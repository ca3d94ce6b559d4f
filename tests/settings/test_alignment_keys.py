"""Argument files of preference methods as other tools write them: read, or answered by name."""

import pytest

from finetune.errors import UserError
from finetune.settings.arguments import parse_arguments
from tests.conftest import write_arguments

# Every key of TRL 0.24's own, beside those of transformers, at its default.
TRL_COMMON = {
    "model_init_kwargs": None, "disable_dropout": True, "dataset_num_proc": None, "label_pad_token_id": -100,
    "max_prompt_length": 512, "max_completion_length": None, "max_length": 1024, "truncation_mode": "keep_end",
    "beta": 0.1, "generate_during_eval": False, "padding_value": None, "gradient_checkpointing": True,
    "logging_steps": 10, "learning_rate": 1e-6,
}  # fmt: skip
TRL = {
    "dpo": {
        "ref_model_init_kwargs": {}, "model_adapter_name": None, "ref_adapter_name": None, "force_use_ref_model": False,
        "use_logits_to_keep": False, "pad_token": None, "padding_free": False, "precompute_ref_log_probs": False,
        "precompute_ref_batch_size": None, "tools": [], "loss_type": ["sigmoid"], "use_liger_loss": False,
        "base_model_attribute_name": "model", "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 1.0,
        "reference_free": False, "label_smoothing": 0.0, "use_weighting": False, "rpo_alpha": None, "ld_alpha": None,
        "discopop_tau": 0.05, "loss_weights": None, "sync_ref_model": False, "ref_model_mixup_alpha": 0.6,
        "ref_model_sync_steps": 512,
    },
    "kto": {"loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0, "is_encoder_decoder": None,
            "ref_model_init_kwargs": None, "precompute_ref_log_probs": False, "use_liger_loss": False,
            "base_model_attribute_name": "model"},
    "cpo": {"loss_type": "simpo", "label_smoothing": 0.0, "cpo_alpha": 0.0, "simpo_gamma": 0.5, "alpha": 0.0,
            "is_encoder_decoder": None},
    "orpo": {"loss_type": "orpo", "is_encoder_decoder": None},
}  # fmt: skip
OTHERS = {
    "LLaMA-Factory": {"stage": "dpo", "pref_loss": "orpo", "pref_beta": 0.3, "pref_ftx": 0.0, "pref_bco_weight": 0.0,
                      "ref_model": None, "ref_model_adapters": None, "ref_model_quantization_bit": None},
    "ms-swift": {"rlhf_type": "dpo", "beta": 0.3, "ref_adapters": [], "ref_model_type": None, "rpo_alpha": 1.0,
                 "ref_model_revision": None, "f_divergence_type": "reverse_kl", "ld_alpha": None},
    "Axolotl": {"rl": "dpo", "dpo_beta": 0.3, "dpo_use_weighting": False, "dpo_use_logits_to_keep": True},
    "PaddleNLP": {"loss_type": "sigmoid", "beta": 0.3, "offset_alpha": 0.0, "normalize_logps": False,
                  "model_with_dpo_criterion": True, "ref_model_update_steps": -1, "lazy": False},
}  # fmt: skip
REFUSED = [
    ({"sync_ref_model": True}, "train in rounds, each from the result of the last"),
    ({"ref_model_update_steps": 100}, "train in rounds, each from the result of the last"),
    ({"ref_adapter_name": "reference"}, "reference_model start compares with the adapter in lora_path"),
    ({"ref_adapters": ["a"]}, "merge_lora_params.py"),
    ({"ld_alpha": 0.5}, "log-probabilities count whole answers"),
    ({"f_divergence_type": "js_divergence"}, "the reverse KL"),
    ({"use_weighting": True}, "all pairs count alike"),
    ({"loss_type": ["sigmoid", "bco_pair", "sft"]}, "choose one of sigmoid"),
    ({"loss_weights": [0.8, 0.2]}, "give one loss_type with pref_loss_ratio"),
    ({"alpha": 0.2}, "AlphaPO is not available"),
    ({"tools": [{"name": "f"}]}, "write the functions into the data"),
]


@pytest.fixture
def parse(tmp_path):
    def parse_file(**settings):
        data = tmp_path / "train.json"
        data.write_text('[{"prompt": "q", "chosen": "a", "rejected": "b"}]', encoding="utf-8")
        places = {"model_name_or_path": "org/model", "output_dir": str(tmp_path / "out"), "device": "cpu"}
        more = {"dataset_name_or_path": str(data), "do_train": True}
        return parse_arguments([str(write_arguments(tmp_path / "a.json", **places | more | settings))])

    return parse_file


@pytest.mark.parametrize("method", TRL)
def test_every_key_of_trl_at_its_default_is_read(parse, method):
    args = parse(**TRL_COMMON | TRL[method])
    loss_type = {"dpo": "sigmoid", "kto": "kto", "cpo": "simpo", "orpo": "orpo"}[method]
    assert args.alignment.loss_type == loss_type and args.alignment.disable_dropout
    assert (args.data.max_length, args.data.src_length, args.data.truncation) == (1024, 512, "left")
    assert not [line for line in args.warnings if "no effect" in line]


@pytest.mark.parametrize("tool", OTHERS)
def test_files_of_other_tools_are_read(parse, tool):
    alignment = parse(**OTHERS[tool]).alignment
    assert alignment.beta == 0.3
    assert alignment.loss_type == ("orpo" if tool == "LLaMA-Factory" else "sigmoid")
    assert alignment.sft_loss_ratio == {"LLaMA-Factory": 1.0, "ms-swift": 1.0}.get(tool, 0.0)


@pytest.mark.parametrize("name", ["ref_model", "ref_model_name_or_path"])
def test_a_reference_by_other_names(parse, tmp_path, name):
    (tmp_path / "reference").mkdir()
    assert parse(loss_type="sigmoid", **{name: str(tmp_path / "reference")}).alignment.reference_model == str(
        tmp_path / "reference"
    )


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_what_is_not_here_is_answered_by_name(parse, settings, words):
    with pytest.raises(UserError) as caught:
        parse(**{"loss_type": "sigmoid"} | settings)
    assert any(next(iter(settings)) in fault and words in fault for fault in caught.value.faults)


def test_keep_start_cuts_the_ends(parse):
    assert parse(loss_type="sigmoid", truncation_mode="keep_start").data.truncation == "right"


@pytest.mark.parametrize(
    ("settings", "is_told"),
    [
        (
            {"loss_type": "hinge", "label_smoothing": 0.1},
            "label_smoothing 0.1 has no effect with loss_type hinge",
        ),
        (
            {"loss_type": "sigmoid", "simpo_gamma": 1.5},
            "simpo_gamma 1.5 has no effect with loss_type sigmoid",
        ),
        (
            {"loss_type": "sigmoid", "desirable_weight": 2},
            "desirable_weight 2 has no effect with loss_type sigmoid",
        ),
        ({"loss_type": "sigmoid", "simpo_gamma": 0.5, "dpop_lambda": 50, "label_smoothing": 0.1}, None),
        ({"loss_type": "cpo", "label_smoothing": 0.1, "lora_dropout": 0.0}, None),
        ({"loss_type": "kto", "undesirable_weight": 2, "beta": 0.3}, None),
    ],
)
def test_what_the_loss_does_not_use_is_told(parse, settings, is_told):
    lines = [line for line in parse(**settings).warnings if "no effect" in line]
    assert lines[0].startswith(is_told) if is_told else not lines
