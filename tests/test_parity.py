"""Our optimizers against the official implementations and Optax, step by step."""

import pytest

from .golden.parity_table import TOLERANCES, cases, committed_bounds

CASES = cases()
IDS = [f"{name} ({source.partition(',')[0]})" for name, source in CASES]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("row", CASES, ids=IDS)
def test_trajectory_equals_the_official_one(row, dtype):
    difference = CASES[row](dtype)
    assert difference <= TOLERANCES[dtype]
    committed = committed_bounds()
    assert row in committed, "docs/parity.md is stale: run python tests/golden/parity_table.py"
    assert difference <= committed[row][dtype], "the bound in docs/parity.md no longer holds"


def test_the_table_lists_every_case_and_nothing_else():
    assert committed_bounds().keys() == CASES.keys()
