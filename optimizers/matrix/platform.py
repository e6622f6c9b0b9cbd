"""Where a program that is traced will run."""

import jax


def platform() -> str:
    """As "cpu" or "tpu": that of the mesh's devices, if it says so, or else of the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
