"""Trains under Fleet's sharding stages 2 and 3 on this rank and saves how far that is from one process.

Arguments: a folder for the results; a file with the cases, as JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np
from paddle.distributed import ParallelEnv

from finetune.machine.half_precision import install
from finetune.processes.groups import start_groups
from finetune.processes.layout import Layout
from tests.distributed.group_sharded import train_alone, train_with_fleet

NUM_STEPS = 5


def largest_difference(facts, expected, key):
    pairs = zip(facts[key], expected[key], strict=False)
    return max((abs(value / wanted - 1) for value, wanted in pairs), default=0.0)


def main():
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    groups = start_groups(Layout(sharding=ParallelEnv().world_size), device="cpu")
    if any("dtype" in case for case in cases.values()):
        install()
    results = {}
    for name, case in cases.items():
        expected = train_alone(case, NUM_STEPS)
        facts = train_with_fleet(case, NUM_STEPS, groups.sharding)
        weights = facts.pop("weights")
        facts["loss"] = largest_difference(facts, expected, "losses")
        facts["norm"] = largest_difference(facts, expected, "norms")
        differences = [np.abs(weights[key] - wanted).max() for key, wanted in expected["weights"].items()]
        facts["weight"] = float(max(differences))
        results[name] = facts
        print(name, facts, flush=True)
    (folder / f"results.{groups.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
