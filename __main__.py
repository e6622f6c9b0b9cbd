"""`python -m ravine`, and the command `ravine`."""

import sys

from .training.cli import main
from .training.run.interrupts import leave


def run() -> None:
    """Runs the command line and ends the process with its status."""
    status = main()
    if status > 128:  # interrupted: other threads may be busy
        leave(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
