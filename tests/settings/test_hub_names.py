"""Names of hubs in settings: no paths, and AI Studio's by the switch that PaddleNLP has for it."""

import pytest

from finetune.data.reading.splits import find_sources
from finetune.errors import UserError
from finetune.settings.paths import looks_like_path
from tests.settings.argument_files import parse

pytestmark = pytest.mark.usefixtures("in_a_folder_with_data")


def test_from_aistudio_turns_names_into_those_of_the_hub(tmp_path):
    given = {"model_name_or_path": "someone/model", "tokenizer_name_or_path": str(tmp_path)}
    model = parse(given, "--from_aistudio", "true").model
    assert model.model_name_or_path == "aistudio://someone/model"
    assert model.tokenizer_name_or_path == str(tmp_path)
    given["model_name_or_path"] = "hf://someone/model"
    assert parse(given, "--from_aistudio", "true").model.model_name_or_path == "hf://someone/model"


@pytest.mark.parametrize("name", ["hf://a/b", "modelscope://a/b@v1", "a/b"])
def test_names_are_no_paths(name):
    assert not looks_like_path(name)


def test_a_data_set_by_name_is_looked_for_on_the_hubs(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = parse({"dataset_name_or_path": "hf://nobody/nothing"}).data
    with pytest.raises(
        UserError, match=r"hf://nobody/nothing is neither a file nor a folder here, and Hugging Face"
    ):
        find_sources(data, training=True, evaluating=False)
    names = parse({"dataset_name_or_path": "hf://nobody/a,hf://nobody/b"}).data.dataset_name_or_path
    assert names == "hf://nobody/a,hf://nobody/b"
