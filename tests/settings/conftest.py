"""A folder with data to read argument files in."""

import pytest

from finetune.machine import device


@pytest.fixture
def in_a_folder_with_data(tmp_path, monkeypatch):
    """The working folder holds `data`; one process, and a Paddle built for CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    monkeypatch.setattr(device, "has_gpu_build", lambda: False)
    (tmp_path / "data").mkdir()
