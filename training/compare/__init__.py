"""The race: optimizers on one task, and the report."""
