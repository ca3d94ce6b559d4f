"""Serves a model: from the command line to the end of the process."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from finetune.errors import EXIT_FAILED, Interrupted
from finetune.machine.device import device_kind
from finetune.machine.environment import check_machine
from finetune.machine.processor import configure_processor
from finetune.machine.quiet import silence_libraries
from finetune.machine.screen import print_text, show_line
from finetune.processes.network.listener import allow_open_files
from finetune.serving.api.options import API_KEY, ServeOptions, parse_options
from finetune.serving.web.hosts import own_names
from finetune.serving.web.listening import listen, url_of, warn_of_openness

_MAX_OPEN_FILES = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, checks, loads, serves until it is stopped; the exit code."""
    options = parse_options(argv)
    check_machine()
    options.check()
    if device_kind(options.model.device) == "cpu":
        configure_processor()
    with listen(options.host, options.port) as listener:
        options.check_listener(listener)
        return _serve(options, listener)


def _serve(options: ServeOptions, listener: socket.socket) -> int:
    from finetune.serving.predict.loading import plan_model

    plan = plan_model(options.model)
    silence_libraries()
    print_text(*plan.notes, stream=sys.stderr)
    from finetune.serving.api.app import build_app
    from finetune.serving.api.gate import Access
    from finetune.serving.api.model import Defaults, load_served
    from finetune.serving.api.server import serve_until_stopped
    from finetune.serving.batching.engine import Engine

    defaults = Defaults(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p
    )
    model, maker = load_served(plan, options.served_name, defaults)
    engine = Engine(maker, max_rows=options.max_batch_size, max_waiting=options.max_waiting)
    access = Access(
        own_names(options.host, options.allowed_hosts),
        options.api_key,
        is_behind_proxy=bool(options.allowed_hosts),
    )
    gate = build_app(model, engine, access, request_seconds=options.request_timeout)
    allow_open_files(_MAX_OPEN_FILES)
    if warning := warn_of_openness(listener, API_KEY.name):
        print_text(warning, stream=sys.stderr)
    print_text(f"{model.name} is served at {url_of(listener)}/v1 (Ctrl-C ends it)")
    try:
        was_stopped = serve_until_stopped(gate, engine, listener, drain_seconds=options.shutdown_timeout)
    except (KeyboardInterrupt, Interrupted):
        was_stopped = True
    if not was_stopped:
        show_line("error: the model does not run any more, see above")
        return EXIT_FAILED
    print_text("stopped", stream=sys.stderr)
    return 0
