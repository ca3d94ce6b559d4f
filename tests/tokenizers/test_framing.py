"""What each family's model sees and learns of one sample, token by token, and where its answers end.

The rows of `tests/families/cases.py` say what is expected.
"""

from __future__ import annotations

import json
import shutil

import pytest

from finetune.data.samples.dataset import load_prompts, load_samples
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.data.templates.template import load_template
from finetune.families.family import families
from finetune.models.layers import find_layer
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny
from finetune.parallel.parallel_model import ParallelModel
from finetune.processes.groups import ProcessGroups
from finetune.tokenizers.encoder import FamilyEncoder
from finetune.tokenizers.fast_encoder import load_fast_encoder
from finetune.tokenizers.loading import load_tokenizer
from finetune.training.evaluation import GenerationEvaluation, GenerationSettings
from tests.families.cases import CASES

SOURCE, TARGET = "a red dress", "fits well 上衣"
# Of a family with two rows the last one: keys and values in fewer heads.
ROWS = {row.name: row for row in CASES}


@pytest.fixture(scope="module")
def folder(family, corpus, tmp_path_factory):
    options = {"vocab_size": 330, "num_layers": 1, "hidden_size": 32} | ROWS[family.name].options
    return build_tiny(family.name, tmp_path_factory.mktemp("framing") / family.name, corpus=corpus, **options)


@pytest.fixture(scope="module")
def encoder(folder, family):
    return FamilyEncoder(load_tokenizer(folder, family), family)


@pytest.fixture
def framing(family):
    return ROWS[family.name].framing


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"src": SOURCE, "tgt": TARGET}) + "\n", encoding="utf-8")
    return path


def sample_of(data, encoder, max_length: int):
    (sample,), _ = load_samples([data], encoder, load_template(None), src_length=32, max_length=max_length)
    return sample


def test_every_family_has_a_row():
    assert set(ROWS) == set(families())


def test_each_token_of_a_sample(data, encoder, framing):
    sample = sample_of(data, encoder, max_length=64)
    learned = [*framing.target, framing.end]
    expected = [*framing.prompt, *learned]
    # input_ids leave out the last token, labels the first.
    ids = [*sample.input_ids.tolist(), int(sample.labels[-1])]
    assert [(index, shown(encoder, index)) for index in ids] == expected
    num_prompt_tokens = len(framing.prompt)
    assert sample.labels.tolist() == [IGNORE_INDEX] * (num_prompt_tokens - 1) + [
        index for index, _ in learned
    ]
    assert sample.labels.tolist().count(framing.end[0]) == 1
    assert encoder.decode(ids[:num_prompt_tokens]) == SOURCE
    assert encoder.decode(ids[num_prompt_tokens:]) == TARGET
    assert encoder.pad_token_id == framing.pad_token_id


def test_a_target_that_was_cut_does_not_teach_to_stop(data, encoder, framing):
    whole = sum(map(len, (framing.prompt, framing.target)))
    for max_length in (whole, whole - 2):  # no room for the end alone, and for the last tokens neither
        sample = sample_of(data, encoder, max_length)
        learned = sample.labels[sample.labels != IGNORE_INDEX].tolist()
        kept = max_length - len(framing.prompt)
        assert learned == [index for index, _ in framing.target][:kept]
        assert sample.truncated_target


def test_generation_starts_from_the_prompt_that_was_trained(data, encoder, framing):
    (prompt,), _ = load_prompts([data], encoder, load_template(None), src_length=32)
    assert prompt.input_ids.tolist() == [index for index, _ in framing.prompt]


def test_generation_stops_at_the_end_that_was_learned(data, folder, encoder, framing, family):
    assert tuple(shown(encoder, index) for index in encoder.chat_end_ids) == framing.chat_ends
    prompts, _ = load_prompts([data, data], encoder, load_template(None), src_length=32)
    model = load_model(resolve_model(folder), dtype="float32", encoder=encoder)
    answer = [index for index, _ in framing.target]
    for end in (encoder.eos_token_id, *encoder.chat_end_ids):
        said, num_passes = generate(model, prompts, encoder, family, script=[*answer, end, *answer])
        assert said == [TARGET, TARGET]
        assert num_passes == len(answer) + 1, "it went on behind the end"
    said, num_passes = generate(model, prompts, encoder, family, script=answer * 2)
    assert num_passes == len(answer) * 2, "it stopped at a token that is no end"


def shown(encoder, index: int) -> str:
    """Text of one token; its name where it has no text of its own."""
    token = encoder.tokenizer.convert_ids_to_tokens(index)
    return encoder.decode([index]) or (token.decode() if isinstance(token, bytes) else token)


def generate(model, prompts, encoder, family, *, script: list[int]) -> tuple[list[str], int]:
    """Texts, and the number of forward passes, of a model that is made to say one token after another."""
    import paddle

    num_passes = 0

    def dictate(_layer, _inputs, logits):
        nonlocal num_passes
        num_passes += 1
        wish = paddle.zeros([logits.shape[-1]])
        wish[script[num_passes - 1]] = 1e6
        return logits + wish

    settings = GenerationSettings(max_new_tokens=len(script))
    evaluation = GenerationEvaluation(prompts, batch_size=2, encoder=encoder, settings=settings, seed=0)
    hook = find_layer(model, family.head_module).register_forward_post_hook(dictate)
    try:
        evaluation.run(ParallelModel(model, ProcessGroups()), lambda: None)
    finally:
        hook.remove()
    return [each["output"] for each in evaluation.generations], num_passes


def test_the_folder_says_whether_a_text_is_opened(folder, family, encoder, tmp_path):
    """`add_bos_token`, as transformers' classes of these families read it; its general class does not."""
    if not family.tokenizer.reads_add_bos:
        pytest.skip("transformers' class of this family does not read it")
    bos = (encoder.tokenizer.bos_token_id,)
    for number, (changes, expected) in enumerate(
        [
            ({"add_bos_token": False}, ()),
            ({"add_bos_token": True}, bos),
            ({"add_bos_token": None}, bos if family.tokenizer.prefix else ()),
            (
                {"add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"},
                family.tokenizer.prefix and bos,
            ),
        ]
    ):
        changed = shutil.copytree(folder, tmp_path / str(number))
        path = changed / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        tokenizer = load_tokenizer(changed, family)
        for fast in (load_fast_encoder(changed, family)[0], None):
            assert FamilyEncoder(tokenizer, family, fast).prefix_ids == expected, (changes, bool(fast))
