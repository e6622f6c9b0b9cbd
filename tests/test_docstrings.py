"""Every example in a docstring runs, and every public function has an example."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import ravine

# Importing this module runs the command line; it has no functions of its own.
NOT_A_LIBRARY = {"ravine.__main__"}
MODULES = [
    "ravine",
    *(
        module.name
        for module in pkgutil.walk_packages(ravine.__path__, "ravine.")
        if module.name not in NOT_A_LIBRARY
    ),
]
PACKAGES = (ravine, ravine.schedules, ravine.stability)
FUNCTIONS = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in PACKAGES
    for name in package.__all__
    if callable(getattr(package, name))
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0, "the differences are in the captured output"


def test_the_walk_finds_every_room():
    rooms = {name.split(".")[1] for name in MODULES if "." in name}
    assert {"optimizers", "schedules", "stability", "training"} <= rooms


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_names_are_documented(name):
    thing = FUNCTIONS[name]
    doc = inspect.getdoc(thing)
    assert doc
    # States are tuples of arrays that users read but do not construct.
    if not (inspect.isclass(thing) and issubclass(thing, tuple)):
        assert "Example:" in doc
        assert doctest.DocTestParser().get_examples(doc)
        # Otherwise test_examples_run would miss the example.
        assert thing.__module__ in MODULES
