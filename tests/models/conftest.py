"""A loopback hub for the tests of names."""

import pytest

from tests.models.hub_server import closed_port, running_hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub for all names, empty caches, and PaddleNLP's hub out of reach."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")
    for name in (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_HUB_CACHE",
        "HF_TOKEN",
        "MODELSCOPE_API_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PPNLP_HOME", str(tmp_path / "paddlenlp"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("AISTUDIO_CACHE_HOME", str(tmp_path / "aistudio"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.setenv("PPNLP_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    with running_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        monkeypatch.setenv("AISTUDIO_ENDPOINT", server.url)
        yield server
