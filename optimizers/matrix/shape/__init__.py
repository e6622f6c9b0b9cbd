"""How a leaf is a batch of matrices, and matrices a grid of blocks."""
