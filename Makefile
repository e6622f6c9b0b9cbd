# Two commands matter: `make race` (the main job) and `make test`.
# Both build .venv first when it is missing or pyproject.toml has changed.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
# More flags for the race: make race RACE="--steps 20"
RACE ?=

.PHONY: race test notebooks processes test-slow test-pods docs linkcheck guard lint format golden clean

race: $(STAMP)
	@echo "==> race: optimizers train the same language model on this Python's own source text"
	$(BIN)/python -m ravine race $(RACE)

# Files, not tests, are dealt to the two processes: the tests of a file share what they have compiled.
# A test is in one of five groups, by its marker, or in `make test` if it has none (pyproject.toml).
TESTS = $(PYTEST) -n 2 --dist loadfile

test: $(STAMP)
	@echo "==> test: all short tests, on 8 virtual CPU devices, 2 processes"
	$(TESTS) -m "not slow and not pods and not notebooks and not processes"

notebooks: $(STAMP)
	@echo "==> notebooks: each runs from top to bottom and shows what is committed"
	$(PYTEST) -n 2 -m "notebooks and not slow" tests/test_notebooks.py

processes: $(STAMP)
	@echo "==> processes: several processes, and several cores, have the losses of one; signals to a process"
	$(PYTEST) -n 2 -m "processes and not slow" tests/test_processes.py tests/test_bucket_orbax.py tests/test_threads.py tests/test_bad_days_processes.py

test-slow: $(STAMP)
	@echo "==> test-slow: the long sweeps, compiled as for users"
	XLA_FLAGS= $(TESTS) -m slow

# The TPU's compiler in a folder of its own: in .venv, JAX would look for a TPU at every start.
TPU := .cache/tpu
LIBTPU = $(shell $(BIN)/python -c 'import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')

$(TPU)/.installed: $(STAMP)
	@echo "==> setup: installing the TPU's compiler into $(TPU)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(TPU) '$(LIBTPU)'
	@touch $@

test-pods: $(TPU)/.installed
	@echo "==> test-pods: optimizers compiled for TPU pods, without a TPU"
	PYTHONPATH=$(TPU) $(PYTEST) -n 2 -m pods tests/test_pods.py

SITE := .cache/site

$(VENV)/.docs: pyproject.toml
	@test -n "$(PYTHON)" || { echo "ravine needs Python 3.11 or newer; none was found (give one: make PYTHON=/path/to/python3.11 ...)"; exit 1; }
	@echo "==> setup: installing ravine and Sphinx into $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	@echo "==> docs: the site, with warnings as errors, into $(SITE)/index.html"
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -W --keep-going -q -b html -d .cache/doctrees -c docs . $(SITE)

linkcheck: $(VENV)/.docs
	@echo "==> linkcheck: every link out of the site is followed; needs the network"
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -q -b linkcheck -d .cache/doctrees -c docs . .cache/linkcheck

guard: $(STAMP)
	@echo "==> guard: a fast part of the benchmarks, its ratios against committed bounds"
	OPENBLAS_NUM_THREADS=1 JAX_PLATFORMS=cpu $(BIN)/python benchmarks guard

lint: $(STAMP)
	@echo "==> lint: ruff and basedpyright"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "ravine needs Python 3.11 or newer; none was found (give one: make PYTHON=/path/to/python3.11 ...)"; exit 1; }
	@echo "==> setup: installing ravine and what it needs into $(VENV) (once, a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .cache build *.egg-info
