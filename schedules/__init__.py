"""Functions `count -> value`, for whatever a run changes over time.

The conventions, fixed once: ``schedule(count)`` takes the number of updates already made; a run of
T steps uses counts 0 to T - 1; ``schedule(T)`` is the end value and stays so.
"""

from .shapes import constant, cosine, linear
from .warmup import warmup

__all__ = ["constant", "cosine", "linear", "warmup"]
