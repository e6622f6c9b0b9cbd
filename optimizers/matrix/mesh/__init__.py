"""Where matrices lie on a mesh, and how they move."""
