"""Where matrices are placed on a mesh, and how they move."""
