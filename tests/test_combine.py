"""`combine_by_role`: which parameters each optimizer gets, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine
from ravine.optimizers.roles import role_table

RULES = [("embedding$", "embedding"), ("kernel$", "matrix"), ("scale$", "norm")]
PARAMS = {
    "embedding": jnp.ones((4, 2)),
    "layers": {"kernel": jnp.ones((3, 2, 2)), "scale": jnp.ones((3, 2))},
}
ASSIGNMENT = {"matrix": "lion", "embedding": "sgd", "norm": "sgd"}


def optimizers():
    return {"lion": ravine.lion(0.1), "sgd": ravine.sgd(0.5)}


def test_every_role_gets_its_optimizer():
    tx = ravine.combine_by_role(optimizers(), ASSIGNMENT, RULES)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 3.0), PARAMS)
    updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["layers"]["kernel"], -0.1)
    np.testing.assert_allclose(updates["layers"]["scale"], -1.5)
    np.testing.assert_allclose(updates["embedding"], -1.5)


def test_one_table_says_who_gets_what():
    lion = ravine.lion(0.1, weight_decay=0.5)
    tx = ravine.combine_by_role({"lion": lion, "sgd": ravine.sgd(0.5)}, ASSIGNMENT, RULES)
    lines = role_table(PARAMS, RULES, tx).splitlines()
    cells = {line.split()[0]: line.split()[-2:] for line in lines[1:]}
    assert cells == {
        "embedding": ["sgd", "no"],
        "layers/kernel": ["lion", "0.5"],
        "layers/scale": ["sgd", "no"],
    }


def test_faults():
    with pytest.raises(ValueError, match=r"assigned to 'adam'.*only 'lion', 'sgd'"):
        ravine.combine_by_role(optimizers(), ASSIGNMENT | {"norm": "adam"}, RULES)
    with pytest.raises(ValueError, match="no role is assigned to the optimizer 'sgd'"):
        ravine.combine_by_role(optimizers(), {"matrix": "lion"}, RULES)
    left_out = ravine.combine_by_role(optimizers(), {"matrix": "lion", "norm": "sgd"}, RULES)
    with pytest.raises(ValueError, match=r"'embedding' has the role 'embedding'.*assign it"):
        left_out.init(PARAMS)
    with pytest.raises(ValueError, match=r"the assignment has 'martix'.*did you mean matrix"):
        ravine.combine_by_role(optimizers(), {"martix": "lion", "norm": "sgd"})
    unused = ravine.combine_by_role(optimizers(), {"matrix": "lion", "router": "sgd"}, [RULES[1]])
    with pytest.raises(ValueError, match="'sgd' gets no parameter"):
        unused.init({"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="match no role rule"):
        ravine.combine_by_role(optimizers(), ASSIGNMENT, RULES[:2]).init(PARAMS)
