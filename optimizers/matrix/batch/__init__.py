"""Many matrices, few kernels: joined, processed in chunks, refreshed."""
