"""A race of six steps of a tiny model, from the command line, and what a run has written."""

import json

from ravine.training.cli import main

SMALL = ["--width", "16", "--layers", "1", "--heads", "2", "--context", "16", "--batch-size", "4"]
SHORT = ["--steps", "6", "--eval-every", "3", "--eval-batches", "2", *SMALL]


def race(*words, text, out):
    """Its exit status."""
    return main(["race", *SHORT, "--data", text, "--out", str(out), *words])


def timed_records(run):
    """The records in the folder of a run, which must be strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def records(run):
    """The records in the folder of a run, without what depends on the clock."""
    return [
        {name: x for name, x in record.items() if name != "seconds"}
        for record in timed_records(run)
    ]
