import socket
import threading
import time

import pytest

from finetune.errors import UserError
from finetune.models import hub
from finetune.models.resolve import resolve_model
from finetune.tokenizers.loading import load_tokenizer

NO_PROXY = {"no_proxy": "*", "NO_PROXY": "*"}


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
    """Points the hub at a local port, with an empty cache."""
    for name, value in NO_PROXY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PPNLP_HOME", str(tmp_path / "cache"))
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{_closed_port()}")
    return lambda port: monkeypatch.setenv("PPNLP_ENDPOINT", f"http://127.0.0.1:{port}/models")


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_unreachable_hub_says_what_to_do(hub_at):
    hub_at(_closed_port())
    with pytest.raises(UserError) as error:
        resolve_model("meta-llama/Llama-2-7b")
    message = str(error.value)
    assert "'meta-llama/Llama-2-7b' is no local folder" in message
    assert "config.json" in message
    assert "model.safetensors" in message
    assert "tokenizer_config.json" in message
    assert "python -m finetune.models.tiny llama ./tiny-llama" in message
    with pytest.raises(UserError, match=r"cannot be reached"):
        load_tokenizer("meta-llama/Llama-2-7b")


def test_open_port_counts_as_reachable(hub_at):
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub_at(server.getsockname()[1])
        assert hub.is_reachable()


def test_slow_name_look_up_is_given_up(hub_at, monkeypatch):
    hub_at(1)
    released = threading.Event()

    def look_up(*_, **__):
        released.wait(30)
        raise OSError("no such host")

    monkeypatch.setattr(socket, "create_connection", look_up)
    start = time.monotonic()
    assert not hub.is_reachable(timeout_seconds=0.2)
    assert time.monotonic() - start < 5
    released.set()


def test_an_earlier_download_is_used_without_the_network(hub_at, tmp_path, llama_folder):
    hub_at(_closed_port())
    target = tmp_path / "cache" / "models" / "someone" / "model"
    target.parent.mkdir(parents=True)
    llama_folder.rename(target)
    assert resolve_model("someone/model").folder == target
