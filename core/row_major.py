"""Arrays in the layout in which they were given."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def row_major(x: jax.Array) -> jax.Array:
    """The array, whose last axis the compiler keeps contiguous.

    Otherwise XLA for TPU gives a loop's whole carry the layout that is best for the products in the
    loop, and copies the state at the beginning and at the end; and XLA for CPU transposes what LAPACK
    stores by columns in the loop of every kernel that uses it, instead of once in a fast copy.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
