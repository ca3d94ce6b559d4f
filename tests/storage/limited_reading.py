"""Reads each weight file of a folder in a process that may take so much memory: what it said, and how long it took.

`python limited_reading.py FOLDER MAX_BYTES` writes one line of JSON for each file.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

from finetune.errors import UserError
from finetune.storage.checkpoints import read_file

_MAX_SECONDS = 20  # of a process that would never end


def _read(path: Path) -> str:
    try:
        return f"read {sorted(read_file(path).arrays)}"
    except UserError as error:
        return f"UserError: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def main(folder: Path, max_bytes: int) -> None:
    for path in sorted(folder.iterdir()):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
            resource.setrlimit(resource.RLIMIT_CPU, (_MAX_SECONDS, _MAX_SECONDS))
            start = time.process_time()
            said = _read(path)
            os.write(writing, json.dumps([said[:2000], time.process_time() - start]).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            answer = pipe.read()
        _, status = os.waitpid(pid, 0)
        said, seconds = json.loads(answer) if answer else (f"ended with status {status}", 0.0)
        print(json.dumps([path.name, said, seconds]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
