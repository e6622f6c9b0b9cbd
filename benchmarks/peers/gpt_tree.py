"""The tree all benchmarks share and one set of gradients for it, with numpy alone.

The peers' scripts run in environments with their own library and numpy, but without ravine.
"""

import numpy as np


def gpt_tree(width: int = 512, layers: int = 6) -> dict[str, np.ndarray]:
    """37 leaves and 19.9 M parameters unless told otherwise; the vocabulary is four times the width."""
    wide = 4 * width
    shapes = {"embed": (wide, width)}
    for layer in range(layers):
        for name in ("query", "key", "value", "output"):
            shapes[f"{layer}/{name}"] = (width, width)
        shapes |= {f"{layer}/up": (width, wide), f"{layer}/down": (wide, width)}
    return fill(shapes, seed=0)


def gradients(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Normal numbers with standard deviation 0.02, the same at every step."""
    return fill({name: array.shape for name, array in tree.items()}, seed=1)


def fill(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Normal arrays with standard deviation 0.02."""
    rng = np.random.default_rng(seed)
    return {k: (0.02 * rng.standard_normal(s)).astype(np.float32) for k, s in shapes.items()}
