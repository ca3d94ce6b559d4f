"""The server in this process, on a real port, and plain requests to it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from openai import OpenAI

from finetune.serving.api.app import build_app
from finetune.serving.api.gate import Access, Gate
from finetune.serving.api.model import Defaults, ServedModel, load_served
from finetune.serving.api.server import GracefulServer
from finetune.serving.batching.engine import BatchMaker, Engine
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.predict.loading import plan_model
from finetune.serving.web.listening import listen

NAME = "mine"
DEFAULTS = Defaults(max_new_tokens=200, temperature=1.0, top_p=1.0)


@dataclass
class Running:
    """A server that runs.

    Attributes:
        port: Of 127.0.0.1.
    """

    port: int
    model: ServedModel
    engine: Engine
    gate: Gate
    server: GracefulServer
    thread: threading.Thread

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        """OpenAI's client, which asks once."""
        return OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key=key,
            **{"max_retries": 0, "timeout": 60.0, **options},
        )

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, JSON object and headers of an answer; a body that is no bytes is sent as JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(
                method, path, data, {name.replace("_", "-"): value for name, value in headers.items()}
            )
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, json.loads(answer.read()), found

    def wait_for_rows(self, count: int, seconds: float = 30) -> None:
        """Until so many rows run or wait."""
        end = time.monotonic() + seconds
        while self.engine.num_rows != count:
            assert time.monotonic() < end, f"{self.engine.num_rows} rows are there"
            time.sleep(0.01)

    def wait_until_idle(self, seconds: float = 30) -> None:
        """Until no row runs or waits."""
        end = time.monotonic() + seconds
        while self.engine.num_rows or self.gate.num_open:
            assert time.monotonic() < end, f"{self.engine.num_rows} rows are left"
            time.sleep(0.01)


def load(folder: Path, **options: Any) -> tuple[ServedModel, BatchMaker]:
    """A model as the command loads it."""
    return load_served(plan_model(ModelOptions(model_name_or_path=str(folder), **options)), NAME, DEFAULTS)


@contextlib.contextmanager
def running(
    model: ServedModel,
    maker: BatchMaker,
    *,
    max_rows: int = 4,
    max_waiting: int = 8,
    access: Access | None = None,
    request_seconds: float = 60,
    drain_seconds: float = 30,
) -> Iterator[Running]:
    """Serves until the block ends."""
    engine = Engine(maker, max_rows=max_rows, max_waiting=max_waiting)
    gate = build_app(model, engine, access or Access(), request_seconds=request_seconds)
    server = GracefulServer(gate, engine, drain_seconds=drain_seconds)
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        engine.start()
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield Running(port, model, engine, gate, server, thread)
        finally:
            for _ in range(2):  # at once
                server.handle_exit(15, None)
            thread.join(30)
            assert not thread.is_alive()
            engine.close(timeout=30)


def raw(port: int, data: bytes) -> socket.socket:
    """A connection that has sent something."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(data)
    return connection
