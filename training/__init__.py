"""The Flax trainer: model, data, loop, race and report."""
