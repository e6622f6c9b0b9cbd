"""A race of six steps of a tiny model, from the command line."""

from ravine.training.cli import main

SMALL = ["--width", "16", "--layers", "1", "--heads", "2", "--context", "16", "--batch-size", "4"]
SHORT = ["--steps", "6", "--eval-every", "3", "--eval-batches", "2", *SMALL]


def race(*words, text, out):
    """Its exit status."""
    return main(["race", *SHORT, "--data", text, "--out", str(out), *words])
