"""Shapes of published models, and rules for new ones."""
