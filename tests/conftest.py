"""Strict JAX for every test: 8 CPU devices, no implicit promotion of dtypes or ranks."""

import functools
import gc
import importlib.metadata
import inspect
import itertools
import math
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# OpenBLAS threads wait for each other on a busy machine: QR took 230 ms instead of 23 (n = 512), 18
# instead of 1 (n = 128).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# XLA aborts the process if it does not know a flag, so the flags depend on the version.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Small tests spend nearly all of their time on compilation, and skipping XLA optimizations cuts that
    # to a third. XLA_FLAGS="" compiles as for users; so do the slow tests, which run longer than they
    # compile. Workers and other processes inherit this setting.
    if "XLA_FLAGS" not in os.environ:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        os.environ["XLA_FLAGS"] = (
            "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        )
    # A device may be late on a busy machine, and XLA aborts a process that waits 40 s in a collective.
    if "collective_call_terminate" not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=600"

import jax
import pytest
from jax._src.interpreters import mlir
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# All processes and later runs of this checkout share a cache; JAX's key covers version and flags.
_CACHE = Path(__file__).parents[1] / ".cache" / "jax"
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _shared(make, times):
    """`make`, but that each of its results is returned so many times."""
    made, calls = make(), itertools.count(1)

    def last():
        nonlocal made
        if next(calls) % times == 0:
            made = make()
        return made

    return last


# JAX loads MLIR's dialects for every program, which takes half of the time of lowering a small one.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    mlir.make_ir_context = _shared(mlir.make_ir_context, 100)
# tyro reads the source of every configuration again for each command.
inspect.getsource = functools.cache(inspect.getsource)
# The garbage collector walks through all that JAX has traced; calling it less often saves 10 %.
gc.freeze()
gc.set_threshold(200_000, 50, 50)


def pytest_unconfigure():
    """Exit without searching everything that is left for objects to free."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def forget():
    """Drop what a file has compiled: other files cannot use it, and it would grow to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def uncached():
    """Compile programs instead of reading them from the cache.

    XLA for CPU (jaxlib 0.10.2) corrupts memory when a program loaded from the cache sums over devices
    inside a loop or a branch (docs/log.md, 29 November 2026).
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def float64():
    """Allow float64 arrays."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def memory():
    """Buckets in memory, as fsspec has them; empty again after the test."""
    import fsspec

    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, empty before the test."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def untimed(monkeypatch):
    """Skip the separate timing of the optimizer at the end of a run, which needs another compilation."""
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
    """A function that returns a new random key per call; the sequence is the same in every run."""
    key = jax.random.key(0)

    def next_key():
        nonlocal key
        key, subkey = jax.random.split(key)
        return subkey

    return next_key
