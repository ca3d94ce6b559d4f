import json

import pytest

from finetune.data.reading.conversation import Turn
from finetune.data.reading.formats import FORMATS
from finetune.data.reading.self_cognition import OWN_FILE, make_self_cognition, split_names
from finetune.data.reading.splits import find_sources, read_splits
from finetune.data.samples.bulk_encoding import EACH
from finetune.data.samples.tokenize import TRAIN_ON, TRUNCATIONS
from finetune.errors import UserError
from finetune.settings.data import DATASET_FORMATS, DataArguments


@pytest.fixture
def make_set(tmp_path):
    def make(name, **sizes):
        folder = tmp_path / name
        folder.mkdir()
        for split, size in sizes.items():
            rows = [json.dumps({"src": f"{name} {split} {i}", "tgt": "x"}) for i in range(size)]
            (folder / f"{split}.json").write_text("\n".join(rows))
        return folder

    return make


def read(training=True, evaluating=True, seed=1, **settings):
    data = DataArguments(**settings)
    sources = find_sources(data, training=training, evaluating=evaluating)
    return read_splits(data, sources, seed=seed, training=training, evaluating=evaluating)


def prompts(conversations):
    return [conversation.turns[0].prompt for conversation in conversations]


def test_choices_are_those_of_the_data_path():
    fields = DataArguments.__dataclass_fields__
    assert tuple(FORMATS) == DATASET_FORMATS == fields["dataset_format"].metadata["choices"]
    assert fields["truncation"].metadata["choices"] == TRUNCATIONS
    assert fields["train_on"].metadata["choices"] == (*TRAIN_ON, EACH)


def test_folder(make_set):
    splits = read(dataset_name_or_path=str(make_set("d", train=3, dev=2)))
    assert prompts(splits.train) == ["d train 0", "d train 1", "d train 2"]
    assert prompts(splits.dev) == ["d dev 0", "d dev 1"]


def test_several_paths(make_set):
    first, second = make_set("a", train=2, dev=1), make_set("b", train=1)
    splits = read(dataset_name_or_path=f"{first}, {second / 'train.json'}")
    assert prompts(splits.train) == ["a train 0", "a train 1", "b train 0"]
    assert prompts(splits.dev) == ["a dev 0"]


def test_path_with_a_comma_in_its_name(make_set):
    assert len(read(dataset_name_or_path=str(make_set("a,b", train=2)), evaluating=False).train) == 2


def test_several_paths_without_any_dev_split(make_set):
    paths = ",".join(str(make_set(name, train=2)) for name in "ab")
    with pytest.raises(UserError, match=r"none of these is a folder with a dev split.*validation_split"):
        read(dataset_name_or_path=paths)


def test_validation_split(make_set):
    path = str(make_set("d", train=20) / "train.json")
    splits = read(dataset_name_or_path=path, validation_split=0.25)
    assert len(splits.train) == 15 and len(splits.dev) == 5
    assert not set(prompts(splits.train)) & set(prompts(splits.dev))
    alone = read(dataset_name_or_path=path, validation_split=0.25, training=False)
    assert alone.dev == splits.dev and not alone.train
    whole = read(dataset_name_or_path=path, validation_split=0.25, evaluating=False)
    assert len(whole.train) == 20


def test_dev_file_goes_before_validation_split(make_set):
    splits = read(dataset_name_or_path=str(make_set("d", train=4, dev=1)), validation_split=2)
    assert len(splits.train) == 4 and prompts(splits.dev) == ["d dev 0"]


def test_limits(make_set):
    path = str(make_set("d", train=50, dev=30))
    splits = read(dataset_name_or_path=path, max_train_samples=5, max_eval_samples=3)
    assert len(splits.train) == 5 and len(splits.dev) == 3
    assert splits.train == read(dataset_name_or_path=path, max_train_samples=5, evaluating=False).train
    assert splits.train != read(dataset_name_or_path=path, max_train_samples=5, seed=2).train
    assert len(read(dataset_name_or_path=path, max_train_samples=500).train) == 50


def test_mix(make_set):
    mixed = [
        {"path": str(make_set("a", train=30, dev=1)), "ratio": 1},
        {"path": str(make_set("b", train=10) / "train.json"), "ratio": 3, "max_samples": 5},
    ]
    splits = read(dataset_mix=mixed)
    assert [sum(p[0] == name for p in prompts(splits.train)) for name in "ab"] == [9, 26]
    assert prompts(splits.dev) == ["a dev 0"]
    held = read(dataset_mix=[mixed[1]], validation_split=2)
    assert not set(prompts(held.train)) & set(prompts(held.dev)) and len(held.dev) == 2
    other = read(dataset_mix=mixed, dataset_name_or_path=str(make_set("c", dev=3)))
    assert len(other.dev) == 3


def test_faults_of_all_sets_of_a_mix_at_once(make_set):
    folders = [make_set(name, train=1) for name in "ab"]
    for folder in folders:
        (folder / "train.json").write_text('{"src": "a", "tgt": "b"}\nbroken')
    mixed = [{"path": str(folder)} for folder in folders]
    with pytest.raises(UserError) as caught:
        read(dataset_mix=mixed, evaluating=False)
    assert [fault.split(": ")[0] for fault in caught.value.faults] == [f"{f}/train.json:2" for f in folders]
    splits = read(dataset_mix=mixed, evaluating=False, on_bad_line="skip")
    assert len(splits.train) == 2 and splits.faults["train"].num_faults == 2


def test_empty_set_of_a_mix(make_set):
    mixed = [{"path": str(make_set("a", train=1))}, {"path": str(make_set("b", train=0))}]
    with pytest.raises(UserError, match="b: no example found"):
        read(dataset_mix=mixed, evaluating=False)


def test_folder_named_like_the_file(tmp_path):
    (tmp_path / "d" / "train.json").mkdir(parents=True)
    for path in (tmp_path / "d", tmp_path / "d" / "train.json"):
        with pytest.raises(UserError, match=r"train\.json"):
            read(dataset_name_or_path=str(path), on_bad_line="skip")


# --- self-cognition ---

NAMES = {"model_name": "小桨 Paddy", "model_author": "某某团队 The Team"}


def test_self_cognition_samples_are_added(make_set):
    path = str(make_set("d", train=3))
    splits = read(
        dataset_name_or_path=path, self_cognition_samples=100, evaluating=False, max_train_samples=2, **NAMES
    )
    added = splits.train[2:]
    assert len(added) == 100
    texts = " ".join(turn.response for conversation in added for turn in conversation.turns)
    assert "小桨" in texts and "Paddy" in texts and "某某团队" in texts and "The Team" in texts
    assert "{{" not in texts and "小桨 Paddy" not in texts


def test_language_of_the_question_decides(tmp_path):
    rows = [
        {"instruction": "Who?", "input": "", "output": "{{name}} by {{ author }}", "system": "{{NAME}}"},
        {"instruction": "谁？", "input": "", "output": "{{name}}"},
    ]
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    english, chinese = make_self_cognition(2, *NAMES.values(), seed=1, file=tmp_path / "qa.json")
    assert english.turns == (Turn("Who?", "Paddy by The Team"),) and english.system == "Paddy"
    assert chinese.turns == (Turn("谁？", "小桨"),)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("小桨 Paddy", ("小桨", "Paddy")),
        ("小桨 Paddle Tuner", ("小桨", "Paddle Tuner")),
        ("Paddle Tuner", ("Paddle Tuner", "Paddle Tuner")),
        ("小桨", ("小桨", "小桨")),
        ("小桨 大模型", ("小桨 大模型", "小桨 大模型")),
    ],
)
def test_names(value, names):
    assert split_names(value) == names


def test_file_without_placeholders(make_set):
    with pytest.raises(UserError, match=r"neither \{\{name\}\} nor \{\{author\}\}"):
        make_self_cognition(1, "a", "b", seed=1, file=make_set("d", train=2) / "train.json")


def test_own_questions_have_both_languages():
    rows = json.loads(OWN_FILE.read_text(encoding="utf-8"))
    assert len({row["query"] for row in rows}) == len(rows) == 32
    assert all("{{name}}" in row["response"] or "{{author}}" in row["response"] for row in rows)
