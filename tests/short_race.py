"""A six-step race of a tiny model, started from the command line, and the records that a run writes."""

import json

from ravine.training.cli import main

SMALL = ["--width", "16", "--layers", "1", "--heads", "2", "--context", "16", "--batch-size", "4"]
SHORT = ["--steps", "6", "--eval-every", "3", "--eval-batches", "2", *SMALL]


def race(*words, text, out):
    """Runs the race and returns its exit status."""
    return main(["race", *SHORT, "--data", text, "--out", str(out), *words])


def timed_records(run):
    """The records in a run's folder, which must be strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def records(run):
    """The records in a run's folder, without the fields that depend on the clock."""
    return [
        {name: x for name, x in record.items() if name != "seconds"}
        for record in timed_records(run)
    ]
