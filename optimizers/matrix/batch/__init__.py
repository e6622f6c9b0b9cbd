"""Many matrices, few kernels: joined, worked on in chunks, refreshed."""
