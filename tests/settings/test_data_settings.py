"""Settings of the data: maps of columns, encodings, several paths, registries; each fault by its message."""

import json

import pytest

from finetune.errors import UserError
from finetune.settings.arguments import parse_arguments
from tests.settings.test_checks import VALID, only_fault_of

pytestmark = pytest.mark.usefixtures("in_a_folder_with_data")


def data_of(*words: str):
    return parse_arguments([*VALID, *words]).data


def test_columns_on_the_command_line_are_json():
    columns = {"prompt": "问题", "response": "回答"}
    assert data_of("--columns", json.dumps(columns)).columns == columns


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("{", "columns is"),
        ('["a"]', "columns is"),
        ('{"promt": "a"}', 'columns: "promt" is no name that can be mapped: choose from prompt, query'),
        ('{"ques": "prompt"}', 'is no name that can be mapped (write {"prompt": "ques"})'),
        ('{"prompt": 3}', "columns: prompt must be the name of a field of the files, as text"),
        ('{"prompt": "a", "response": "a"}', 'columns: "a" is given for several names'),
    ],
)
def test_faulty_columns(value, fault):
    assert fault in only_fault_of("--columns", value)


@pytest.mark.parametrize("name", ["klingon", "", "base64", "rot13"])
def test_an_encoding_that_is_none(name):
    assert f'encoding is "{name}", which is not known' in only_fault_of("--encoding", name)


def test_several_paths_as_a_list(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text('{"src": "a", "tgt": "b"}\n')
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    given = data_of("--eval_dataset", *paths)
    assert given.eval_dataset == ",".join(paths)
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"eval_dataset": paths, "dataset_name_or_path": paths}))
    read = parse_arguments(
        [str(file), "--model_name_or_path", "owner/model", "--output_dir", "out", "--do_train"]
    )
    assert read.data.eval_dataset == read.data.dataset_name_or_path == ",".join(paths)


def test_evaluation_data_that_do_not_exist():
    assert 'eval_dataset is "nowhere.json", which does not exist' in only_fault_of(
        "--eval_dataset", "nowhere.json"
    )


def test_a_name_of_a_registry_is_no_missing_path(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "x.json"}}')
    assert data_of("--dataset_name_or_path", str(tmp_path / "mine")).dataset_name_or_path == str(
        tmp_path / "mine"
    )
    fault = only_fault_of("--dataset_name_or_path", "other", "--dataset_dir", str(tmp_path))
    assert 'dataset_name_or_path is "other", which does not exist' in fault


def test_a_registry_that_is_no_json_is_told(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset_info\.json"):
        data_of("--dataset_name_or_path", str(tmp_path / "mine"))
