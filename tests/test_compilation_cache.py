"""The cache of compiled programs that all test processes share.

JAX writes an entry in place, so another process may read an incomplete one, and a process that is killed
leaves one behind. JAX then compiles the program again and warns; pyproject.toml exempts that warning
from being an error here.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache


def test_a_truncated_entry_is_compiled_again(tmp_path):
    used = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        compilation_cache.reset_cache()
        program = jax.jit(lambda x: x * 3 + 1)
        expected = program(jnp.arange(4.0))
        entries = [path for path in tmp_path.iterdir() if path.stat().st_size > 8]
        assert entries
        for path in entries:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        jax.clear_caches()
        with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
            assert (program(jnp.arange(4.0)) == expected).all()
    finally:
        jax.config.update("jax_compilation_cache_dir", used)
        compilation_cache.reset_cache()
