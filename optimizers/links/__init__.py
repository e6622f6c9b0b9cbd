"""Links to chain with a direction: momentum, decay, learning rate, graft, and others."""
