"""`doctor`: what it tells, and its exit code."""

from __future__ import annotations

from finetune.commands import doctor
from finetune.errors import UserError


def test_it_tells_versions_device_memory_disk(capsys):
    assert doctor.main(["--offline"]) == 0
    text = capsys.readouterr().out
    for word in (
        "paddlenlp 3.0.0b4",
        "runs use the CPU",
        "GiB are free",
        "free for this folder",
        "not tried",
    ):
        assert word in text


def test_it_tells_which_hubs_answer(capsys, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://name:secret@127.0.0.1:9")
    monkeypatch.setattr("finetune.models.hubs.reach.is_reachable", lambda url: "modelscope" in url)
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "Hugging Face (http://***@127.0.0.1:9) cannot be reached" in text and "secret" not in text
    assert "ModelScope" in text and ") answers" in text


def test_faults_end_with_2_and_their_remedy(capsys, monkeypatch):
    def fail() -> None:
        raise UserError(["numpy 2 is installed", "Repair with: pip install 'numpy<2'"])

    monkeypatch.setattr(doctor, "check_machine", fail)
    assert doctor.main(["--offline"]) == 2
    assert (
        "To mend\n  numpy 2 is installed\n  Repair with: pip install 'numpy<2'\n" in capsys.readouterr().out
    )
