"""What is chained with a direction: momentum, decay, learning rate, graft, and the like."""
