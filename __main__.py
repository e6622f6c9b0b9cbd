"""`python -m ravine`: the command line."""

import sys

from .training.cli import main
from .training.run.interrupts import leave

if __name__ == "__main__":
    status = main()
    if status > 128:  # interrupted: other threads may be busy
        leave(status)
    sys.exit(status)
