"""Code that treats a parameter as a batch of matrices."""
