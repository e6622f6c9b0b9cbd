"""Small experiments that answer one question each: `python -m ravine study NAME`."""
