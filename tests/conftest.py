"""Strict JAX for every test: 8 CPU devices, no silent promotion of dtypes or ranks."""

import functools
import gc
import importlib.metadata
import inspect
import math
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# On a busy machine its threads wait for each other: a QR of 512 took 230 ms for 23, one of 128 18 for 1.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# An XLA that does not know a flag ends the process, hence the version.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Nearly all of the time of small tests is compilation, which takes a third where XLA does without
    # optimizations that such programs do not need. XLA_FLAGS="" compiles as for users, as the slow
    # tests are, which run longer than they compile. Workers and other processes inherit what is set.
    if "XLA_FLAGS" not in os.environ:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        os.environ["XLA_FLAGS"] = (
            "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        )
    # On a busy machine a device may be late: XLA ends a process that waits 40 s in a collective.
    if "collective_call_terminate" not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=600"

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# One cache for all processes and later runs of this checkout; JAX's key has its version and the flags.
_CACHE = Path(__file__).parents[1] / ".cache" / "jax"
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# tyro reads the sources of all configurations again at each command.
inspect.getsource = functools.cache(inspect.getsource)
# The garbage collector walks through all that JAX has traced: less often, it saves a tenth of the time.
gc.freeze()
gc.set_threshold(200_000, 50, 50)


def pytest_unconfigure():
    """The process ends without a search of all that is left for what could be freed."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def forget():
    """What a file has compiled is of no use to the next, and grows to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def uncached():
    """Programs are compiled, not read from the cache.

    XLA for CPU (jaxlib 0.10.2) corrupts memory where a program comes out of the cache that sums over
    devices in a loop or a branch (docs/log.md, 29 November 2026).
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def float64():
    """Arrays may be in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def untimed(monkeypatch):
    """Runs do not time the optimizer by itself at their end, which compiles it once more."""
    from ravine.training import train

    monkeypatch.setattr(train, "optimizer_milliseconds", lambda *args: math.nan)


@pytest.fixture(scope="session")
def library():
    """The default corpus."""
    from ravine.training.data.corpus import load_corpus

    return load_corpus()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """The path of a short text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i * i} of a text that says little. " for i in range(400)))
    return str(path)


@pytest.fixture(scope="session")
def corpus(text):
    """The short text, as bytes."""
    from ravine.training.data.corpus import load_corpus

    return load_corpus((text,))


@pytest.fixture
def getkey():
    """A function that returns a fresh random key at each call, the same sequence in every run."""
    key = jax.random.key(0)

    def next_key():
        nonlocal key
        key, subkey = jax.random.split(key)
        return subkey

    return next_key
