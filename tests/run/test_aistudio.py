"""Uploading to AI Studio, against a stand-in for its client."""

import pytest
from aistudio_sdk import hub

from finetune.errors import UserError
from finetune.run.aistudio import upload
from finetune.settings.model import ModelArguments

SETTINGS = ModelArguments(aistudio_repo_id="me/mine", aistudio_token="secret")


@pytest.fixture
def folder(tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer_config.json", "arguments.json", "loss.png"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoint-2").mkdir()
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(hub, "create_repo", lambda **kwargs: made.append(kwargs) or {})
    monkeypatch.setattr(hub, "upload", lambda **kwargs: made.append(kwargs) or {"message": "done"})
    return made


def test_creates_the_repository_and_uploads_the_final_files(folder, calls):
    said = []
    upload(folder, SETTINGS, said.append)
    assert calls[0] == {
        "repo_id": "me/mine",
        "private": True,
        "license": "Apache License 2.0",
        "token": "secret",
    }
    assert [call["path_in_repo"] for call in calls[1:]] == [
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert len(said) == 3
    assert "secret" not in "".join(said)


def test_an_existing_repository_is_used(folder, calls, monkeypatch):
    monkeypatch.setattr(hub, "create_repo", lambda **_: {"error_code": 10003, "error_msg": "exists"})
    upload(folder, SETTINGS, lambda _: None)
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["create_repo", "upload"])
def test_a_refusal_says_that_the_model_is_saved(folder, calls, monkeypatch, name):
    monkeypatch.setattr(hub, name, lambda **_: {"error_code": 10005, "error_msg": "no permission"})
    with pytest.raises(UserError, match=r"10005: no permission.*The trained model is saved"):
        upload(folder, SETTINGS, lambda _: None)


def test_an_unreachable_service_is_no_traceback(folder, calls, monkeypatch):
    def refuse(**_):
        raise ConnectionError("unreachable")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(UserError, match="ConnectionError: unreachable"):
        upload(folder, SETTINGS, lambda _: None)
