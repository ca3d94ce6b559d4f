"""Two "hosts" on one machine: network namespaces with a cable between them that can be pulled.

Their addresses exist inside the namespaces only, so nothing of this machine's own network is touched. It takes root
and the `ip` command; tests skip without them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tests.distributed.processes import Launch, _collect, _environment

_ADDRESSES = ("10.231.7.1", "10.231.7.2")
_MASTER_PORT = 29400


def _ip(*args: str, check: bool = True) -> None:
    subprocess.run(["ip", *args], check=check, capture_output=True, text=True, timeout=20)


def why_not() -> str:
    """Why this machine cannot be split into hosts; empty where it can."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("ip") is None:
        return "needs the ip command"
    name = f"ft-probe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
    except (subprocess.SubprocessError, OSError):
        return "cannot make network namespaces"
    _ip("netns", "del", name, check=False)
    return ""


class Hosts:
    """Two connected hosts.

    Attributes:
        addresses: Their addresses.
        names: Their network namespaces.
    """

    addresses = _ADDRESSES

    def __init__(self, folder: Path):
        self.names = tuple(f"ft-{os.getpid()}-{host}" for host in "ab")
        self._folder = folder
        self._launchers: list[subprocess.Popen[bytes]] = []
        self._logs: list[Path] = []

    def __enter__(self) -> Hosts:
        devices = [f"ft{os.getpid()}{host}" for host in "ab"]
        try:
            for name in self.names:
                _ip("netns", "add", name)
            ends = [part for part in zip(devices, self.names, strict=True)]
            (first, space), (second, other_space) = ends
            _ip(
                "link",
                "add",
                first,
                "netns",
                space,
                "type",
                "veth",
                "peer",
                "name",
                second,
                "netns",
                other_space,
            )
            for (device, name), address in zip(ends, self.addresses, strict=True):
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "address", "add", f"{address}/24", "dev", device)
                _ip("-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        self._cable = ("-n", other_space, "link", "set", second)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for name in self.names:
            _ip("netns", "del", name, check=False)

    def cut(self) -> None:
        """Pulls the cable: packets vanish, no connection is told."""
        _ip(*self._cable, "down")

    def mend(self) -> None:
        """Plugs it in again."""
        _ip(*self._cable, "up")

    def launch(self, script: Path, args: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Starts two processes on each host, by the command that a person would type there."""
        self._logs = []
        for rank, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            logs = Path(tempfile.mkdtemp(prefix=f"host-{rank}-", dir=self._folder))
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "paddle.distributed.launch"]
            command += ["--nnodes", "2", "--nproc_per_node", "2", "--rank", str(rank)]
            command += ["--master", f"{self.addresses[0]}:{_MASTER_PORT}", "--host", address]
            command += ["--log_dir", str(logs), str(script), *args]
            with open(logs / "launcher.log", "w") as output:
                self._launchers.append(
                    subprocess.Popen(command, env=_environment(env), stdout=output, stderr=subprocess.STDOUT)
                )
            self._logs.append(logs)

    def outputs(self) -> list[Launch]:
        """What each host has written so far."""
        found = []
        for process, logs in zip(self._launchers[-2:], self._logs, strict=True):
            code = process.poll()
            found.append(_collect(-1 if code is None else code, logs, logs / "launcher.log", 2))
        return found

    def wait_for(self, text: str, *, timeout: float) -> None:
        """Returns when rank 0 has written a text.

        Raises:
            AssertionError: It did not within `timeout` seconds, or the launch ended.
        """
        end = time.monotonic() + timeout
        while text not in self.outputs()[0].outputs[0]:
            running = all(process.poll() is None for process in self._launchers[-2:])
            if time.monotonic() > end or not running:
                raise AssertionError(f"no {text!r}\n" + "\n".join(one.tails() for one in self.outputs()))
            time.sleep(0.2)

    def wait(self, *, timeout: float) -> list[Launch]:
        """Waits for the end of both launches.

        Raises:
            AssertionError: They have not ended after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        for process in self._launchers[-2:]:
            try:
                process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                tails = "\n".join(one.tails() for one in self.outputs())
                raise AssertionError(f"not ended after {timeout:g} s\n{tails}") from None
        return self.outputs()

    def end(self) -> None:
        """Ends whatever still runs."""
        for launcher in self._launchers:
            if launcher.poll() is None:
                family = [psutil.Process(launcher.pid)]
                with contextlib.suppress(psutil.NoSuchProcess):
                    family += family[0].children(recursive=True)
                for process in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            launcher.wait()


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Two connected hosts for the time of a test; logs go into a folder."""
    with Hosts(folder) as hosts:
        yield hosts
