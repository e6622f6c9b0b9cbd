"""What follows from a model's width: the coordinate check, and how far the best learning rate moves."""
