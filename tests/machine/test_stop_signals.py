"""What the signals that ask a process to stop do, sent for real to processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from finetune.machine.stop_signals import STOP_SIGNALS
from tests.conftest import ROOT

ALL = pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)


def run(code: str) -> subprocess.CompletedProcess[str]:
    """A process that runs the code, which sends itself signals."""
    head = """
        import signal, sys, time
        from finetune.errors import Interrupted
        from finetune.machine.stop_signals import *
        from finetune.processes.command import run_command
        from finetune.training.stop_signal import StopSignal
    """
    text = textwrap.dedent(head) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@ALL
def test_a_command_ends_in_one_line_that_no_library_can_swallow(number):
    done = run(f"""
        def main():
            try:
                signal.raise_signal({int(number)})
            except Exception:
                print("swallowed")
        sys.exit(run_command(main))
    """)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"interrupted: stopped by signal {number.name}; start the same command again to continue\n"
    )


@ALL
def test_repeats_of_a_launcher_change_nothing(number):
    done = run(f"""
        def main():
            try:
                signal.raise_signal({int(number)})
            finally:
                for _ in range(3):
                    signal.raise_signal(signal.SIGTERM)
                    signal.raise_signal(signal.SIGHUP)
                print("cleaned up")
        code = run_command(main)
        signal.raise_signal(signal.SIGTERM)
        sys.exit(code)
    """)
    assert (done.returncode, done.stdout) == (1, "cleaned up\n")
    assert done.stderr.count("\n") == 1


def test_a_second_ctrl_c_ends_at_once():
    done = run("""
        def main():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                print("too late")
        sys.exit(run_command(main))
    """)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "\ninterrupted: ended at once by signal SIGINT\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_was_ignored_stays_ignored(number):
    done = run(f"""
        signal.signal({int(number)}, signal.SIG_IGN)
        sys.exit(run_command(lambda: signal.raise_signal({int(number)})))
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_that_ended_leaves_handlers_as_they_were():
    done = run("""
        before = [signal.getsignal(number) for number in STOP_SIGNALS]
        run_command(lambda: None)
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    """)
    assert (done.returncode, done.stderr) == (0, "")


@ALL
def test_signals_wait_for_the_end_of_an_import(number):
    done = run(f"""
        def main():
            with delayed():
                signal.raise_signal({int(number)})
                signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
                print("imported")
            print("too late")
        sys.exit(run_command(main))
    """)
    assert (done.returncode, done.stdout) == (1, "imported\n")
    assert f"stopped by signal {number.name}" in done.stderr


@ALL
def test_training_notes_the_first_one(number):
    done = run(f"""
        stop = StopSignal()
        with stop.noted():
            signal.raise_signal({int(number)})
            signal.raise_signal(signal.SIGTERM)
            assert stop.number == {int(number)}
    """)
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr == "\nstopping: this step is finished and saved first (Ctrl-C once more ends at once)\n"
    )


def test_training_ends_at_once_at_a_second_ctrl_c():
    done = run("""
        def main():
            stop = StopSignal()
            with stop.noted():
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
                print("goes on")
                signal.raise_signal(signal.SIGINT)
                print("too late")
        sys.exit(run_command(main))
    """)
    assert (done.returncode, done.stdout) == (1, "goes on\n")
    assert (
        "interrupted: stopped at once by a second SIGINT; the steps since the last save are lost"
        in done.stderr
    )


@ALL
def test_they_are_heard_after_the_libraries_are_loaded(number):
    done = run(f"""
        import os
        from finetune.machine.quiet import silence_libraries
        def main():
            silence_libraries()
            os.kill(os.getpid(), {int(number)})  # to the process: what C++ has set decides, too
            time.sleep(5)
        sys.exit(run_command(main))
    """)
    line = f"interrupted: stopped by signal {number.name}; start the same command again to continue"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == line


@ALL
def test_a_signal_while_a_failure_is_told_ends_in_a_line(number):
    """A rank that is not the first gives the first one time to speak; a launcher ends it meanwhile."""
    done = run(f"""
        import os, threading
        from finetune.errors import UserError
        os.environ |= {{"PADDLE_TRAINER_ID": "1", "PADDLE_LOCAL_RANK": "1"}}
        def main():
            threading.Timer(0.3, lambda: os.kill(os.getpid(), {int(number)})).start()
            raise UserError("bad data")
        sys.exit(run_command(main))
    """)
    assert done.returncode == 1
    assert (
        done.stderr.startswith(f"interrupted: stopped by signal {number.name}")
        and done.stderr.count("\n") == 1
    )


@ALL
def test_a_rank_that_failed_keeps_its_exit_code(number):
    """The launcher's SIGTERM comes while Python ends the libraries."""
    done = run(f"""
        import os
        from finetune.errors import UserError
        os.environ |= {{"PADDLE_TRAINERS_NUM": "2"}}
        def main():
            raise UserError("bad data")
        code = run_command(main)
        if {int(number)} != signal.SIGINT:
            signal.raise_signal({int(number)})
        sys.exit(code)
    """)
    assert (done.returncode, done.stderr) == (2, "error: bad data\n")


def test_a_thread_that_runs_before_an_import_does_not_get_them_meanwhile():
    """Paddle's import sets a handler in C++ for a moment, which any thread would run."""
    done = run("""
        import ctypes, os, threading
        def main():
            with kept_from_threads():
                threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
            with delayed():
                ctypes.CDLL(None).signal(signal.SIGTERM, None)  # the default, behind Python's back
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)
                print("imported", flush=True)
        sys.exit(run_command(main))
    """)
    assert (done.returncode, done.stdout) == (1, "imported\n")
    assert done.stderr.startswith("interrupted: stopped by signal SIGTERM")


def test_no_thread_of_a_command_gets_signals_but_the_main_one():
    """They would come through while the main thread holds them back for the import of Paddle, which then fails."""
    done = run("""
        import os
        os.environ["OPENBLAS_NUM_THREADS"] = "4"
        from pathlib import Path
        from finetune.machine.command_start import start_command
        start_command()
        wanted = sum(1 << number - 1 for number in STOP_SIGNALS)
        for task in Path("/proc/self/task").iterdir():
            lines = (task / "status").read_text().splitlines()
            blocked = int(next(line for line in lines if line.startswith("SigBlk")).split()[1], 16)
            print(task.name == str(os.getpid()), blocked & wanted == wanted)
    """)
    kinds = done.stdout.splitlines()
    assert kinds.count("True False") == 1 and set(kinds) <= {"True False", "False True"}, done.stderr
