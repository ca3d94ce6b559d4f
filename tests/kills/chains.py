"""A chain: one subject killed several times, started again each time, and let end at last.

Every kill is one record. What is looked at after it: the exit codes, whether anybody is still there, whether a signal
gave a traceback, and how many finished steps are gone that a save had promised to keep. At the end of the chain what
the output holds is compared with an uninterrupted one, name by name and digit by digit.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.server_runs import Kill, Run
from tests.kills.subjects import SAVE_STEPS, Subject, num_logged, num_saved

_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Baseline:
    """An uninterrupted one.

    Attributes:
        contents: Of its output.
        seconds: That it took.
    """

    contents: dict[str, str]
    seconds: float


def draw_kill(draw: random.Random, subject: Subject, seconds: float) -> tuple[Kill, str]:
    """A kill at a random moment, and what the moment is called."""
    number = draw.choice(_SIGNALS)
    rank = draw.choice([None, *range(subject.world)]) if subject.world > 1 else None
    if draw.random() < 0.5:
        return Kill(None, draw.uniform(0.02, 0.9) * seconds, number, rank), "at random"
    moment = draw.choice(subject.moments)
    return Kill(moment, draw.choice([0.0, 0.0, 0.005, 0.05, 0.2]), number, rank), moment


def run_chain(
    subject: Subject, baseline: Baseline, output: Path, *, seed: int, num_kills: int
) -> Iterator[dict[str, Any]]:
    """The records of a chain: one for every kill that came in time, one for the end.

    Args:
        subject: What is killed.
        baseline: What an uninterrupted one left.
        output: Where it writes; its folder holds nothing else.
        seed: Of the moments.
        num_kills: After which it is let end.
    """
    draw = random.Random(f"{subject.name} {seed}")
    output.parent.mkdir(parents=True)
    for number in range(1, num_kills + 1):
        kill, moment = draw_kill(draw, subject, baseline.seconds)
        before = num_logged(output) if subject.is_training else 0
        run = subject.start(output, kill)
        if not run.killed or not (any(run.codes) or subject.is_server):  # it had ended before the moment came
            break
        yield {
            "subject": subject.name, "seed": seed, "kill": number, "signal": signal.Signals(kill.number).name,
            "rank": "all" if kill.rank is None else kill.rank, "moment": moment,
            **_facts(subject, run, output, kill, before),
        }  # fmt: skip
    last = subject.start(output, None)
    found = subject.contents(output) if _is_done(subject, last, output) else {}
    if found and subject.is_training:  # a finished run says so, and leaves everything as it is
        last = subject.start(output, None)
        found = subject.contents(output)
    differing = sorted(
        name
        for name in found.keys() | baseline.contents.keys()
        if found.get(name) != baseline.contents.get(name)
    )
    yield {
        "subject": subject.name, "seed": seed, "end": True, "codes": list(last.codes), "different": differing,
        "log": "" if found else last.tails()[-2000:], "orphans": last.orphans, "hung": last.hung,
    }  # fmt: skip


def _is_done(subject: Subject, run: Run, output: Path) -> bool:
    """Whether it ended well, or refused because what it would write stands there already."""
    return not any(run.codes) or (not subject.is_training and set(run.codes) == {2} and output.exists())


def _facts(subject: Subject, run: Run, output: Path, kill: Kill, before: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "codes": list(run.codes),
        "hung": run.hung,
        "orphans": run.orphans,
        "lost_steps": 0,
    }
    if subject.is_training:
        logged = num_logged(output)
        is_heard = kill.number != signal.SIGKILL and logged > before
        promised = logged if is_heard and kill.rank is None else max(0, logged - 1) // SAVE_STEPS * SAVE_STEPS
        facts["lost_steps"] = max(0, promised - num_saved(output))
        facts["steps"] = logged
        if logged <= before:
            # Ranks that still look for each other have no watch; the launcher ends them.
            facts["hung"], facts["waited"] = False, run.hung or run.told
    text = "\n".join(run.logs)
    facts["traceback"] = kill.number != signal.SIGKILL and "Traceback" in text
    if facts["traceback"] or facts["hung"] or facts["lost_steps"]:
        facts["log"] = run.tails()[-3000:]
    return facts


def faults(record: dict[str, Any]) -> list[str]:
    """What is wrong with a record; nothing where all is well."""
    if record.get("end"):
        wrong = [f"the end gave {record['codes']}\n{record['log']}"] if record["log"] else []
        return wrong + ([f"different: {record['different']}"] if record["different"] else [])
    names = ("hung", "orphans", "lost_steps", "traceback")
    return [f"{name}: {record[name]}" for name in names if record[name]]
