"""A tiny model that is served, as it is and exported."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from finetune.serving.batching.dynamic_batch import DynamicBatch
from tests.serving.api.running import Running, load, running


@pytest.fixture(scope="session")
def loaded(sharp_llama):
    return load(sharp_llama, chat_template="vicuna", system="Be brief.")


@pytest.fixture(scope="session")
def served(loaded) -> Iterator[Running]:
    with running(*loaded) as server:
        yield server


@pytest.fixture(scope="session")
def served_static(exported_llama) -> Iterator[Running]:
    with running(*load(exported_llama, chat_template="vicuna", system="Be brief.")) as server:
        yield server


@pytest.fixture
def held_steps(monkeypatch) -> threading.Event:
    """Steps behind the first token wait until this is set."""
    event, step = threading.Event(), DynamicBatch.step

    def held(batch):
        assert event.wait(60)
        return step(batch)

    monkeypatch.setattr(DynamicBatch, "step", held)
    return event


@pytest.fixture
def slow_steps(monkeypatch) -> None:
    """Steps behind the first token take a while."""
    step = DynamicBatch.step

    def slow(batch):
        time.sleep(0.2)
        return step(batch)

    monkeypatch.setattr(DynamicBatch, "step", slow)
