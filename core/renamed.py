"""Old names of arguments, and those of other libraries: the error gives the name to use.

Versions before 1.0 do not deprecate; they refuse; `CHANGELOG.md` has the old names as a table.
"""

from collections.abc import Iterable

from .checks import near

BEFORE: dict[str, tuple[str, ...]] = {
    "absolute_ridge": ("roots=ravine.Roots(absolute_ridge=...)",),
    "block": ("blocks=ravine.Blocks(size=...)",),
    "every": ("refresh=ravine.Refresh(every=...)",),
    "exponent": ("roots=ravine.Roots(exponent=...)",),
    "fallback_learning_rate": ("fallback=ravine.Fallback(learning_rate=...)",),
    "graft_b2": ("graft=ravine.Grafting(b2=...)",),
    "graft_eps": ("eps=...",),
    "graft_per": ("graft=ravine.Grafting(per=...)",),
    "limit": ("blocks=ravine.Blocks(bound=...)",),
    "matrix_roles": ("roles=...",),
    "max_elements": ("factors=ravine.Factors(max_elements=...)",),
    "method": ("roots=ravine.Roots(method=...)", "polar=..."),
    "packed": ("factors=ravine.Factors(packed=...)",),
    "patience": ("roots=ravine.Roots(patience=...)",),
    "ridge": ("roots=ravine.Roots(ridge=...)",),
    "root": ("roots=ravine.Roots(method=...)",),
    "root_dtype": ("factors=ravine.Factors(root_dtype=...)",),
    "shampoo_roles": ("roles=...",),
    "sides": ("blocks=ravine.Blocks(sides=...)",),
    "soap_roles": ("roles=...",),
    "staggered": ("refresh=ravine.Refresh(staggered=...)",),
    "start": ("refresh=ravine.Refresh(start=...)",),
    "statistics": ("factors=ravine.Factors(statistics=...)",),
    "statistics_dtype": ("factors=ravine.Factors(statistics_dtype=...)",),
    "tolerance": ("roots=ravine.Roots(tolerance=...)",),
}
"""An old name, and what to write now: the first candidate that is an argument of the function."""

ELSEWHERE: dict[str, tuple[str, ...]] = {
    "accumulator_dtype": ("mu_dtype=...",),
    "adam_b1": ("fallback=ravine.Fallback(b1=...)",),
    "adam_b2": ("fallback=ravine.Fallback(b2=...)",),
    "adam_learning_rate": ("fallback=ravine.Fallback(learning_rate=...)",),
    "adam_weight_decay": ("fallback=ravine.Fallback(weight_decay=...)",),
    "adamw_betas": ("fallback=ravine.Fallback(b1=..., b2=...)",),
    "adamw_eps": ("fallback=ravine.Fallback(eps=...)",),
    "adamw_lr": ("fallback=ravine.Fallback(learning_rate=...)",),
    "adamw_wd": ("fallback=ravine.Fallback(weight_decay=...)",),
    "adam_lr": ("fallback=ravine.Fallback(learning_rate=...)",),
    "adjust_lr_fn": ("scale=...",),
    "beta": ("b1=...",),
    "beta1": ("b1=...",),
    "beta2": ("b2=...",),
    "beta3": ("b3=...",),
    "beta3_warmup": ("b3_warmup=...",),
    "betas": ("b1=... and b2=...",),
    "block_size": ("blocks=ravine.Blocks(size=...)",),
    "consistent_rms": ('scale="moonlight"',),
    "diagonal_epsilon": ("eps=...",),
    "epsilon": ("eps=...",),
    "gamma": ("rho=...",),
    "graft_type": ("graft=ravine.Grafting(step=...)",),
    "grafting_config": ("graft=ravine.Grafting(step=...)",),
    "lr": ("learning_rate=...",),
    "mask": ("weight_decay_mask=...",),
    "matrix_epsilon": ("roots=ravine.Roots(ridge=...)",),
    "max_precond_dim": ("blocks=ravine.Blocks(bound=...)",),
    "max_preconditioner_dim": ("blocks=ravine.Blocks(size=...)",),
    "momentum": ("b1=...",),
    "muon_weight_dimension_numbers": ("rules=...",),
    "ns_coeffs": ("polar=ravine.NewtonSchulz(coefficients=...)",),
    "ns_coefficients": ("polar=ravine.NewtonSchulz(coefficients=...)",),
    "ns_steps": ("polar=ravine.NewtonSchulz(steps=...)",),
    "precondition_frequency": ("refresh=ravine.Refresh(every=...)",),
    "preconditioning_compute_steps": ("refresh=ravine.Refresh(every=...)",),
    "shampoo_beta": ("shampoo_b2=...",),
    "start_preconditioning_step": ("refresh=ravine.Refresh(start=...)",),
    "statistics_compute_steps": ("refresh=ravine.Refresh(statistics_every=...)",),
    "update_interval": ("every=...",),
    "warmup_steps": ("learning_rate=ravine.schedules.warmup(...)",),
    "wd": ("weight_decay=...",),
}
"""A name in Optax, PyTorch or the authors' code, and what to write here, likewise."""

RMSPROP = {"alpha": "b2=...", "decay": "b2=...", "eps_in_sqrt": "eps_root=..."}
"""Names that mean something else for other optimizers."""


def instead(name: str, known: Iterable[str]) -> str:
    """The advice for an argument that is not among the known ones of a function.

    Example:
      >>> from ravine.core.renamed import instead
      >>> instead("matrix_roles", ["roles", "rules"])
      'give roles=...'
      >>> instead("lr", ["learning_rate", "b1"])
      'give learning_rate=...'
      >>> instead("bata", ["b1", "b2", "beta2"])
      'did you mean beta2?'
    """
    known = list(known)
    if "centered" in known and name in RMSPROP:
        return f"give {RMSPROP[name]}"
    for now in (*BEFORE.get(name, ()), *ELSEWHERE.get(name, ())):
        arguments = [part.partition("=")[0] for part in now.split(" and ")]
        if all(argument in known for argument in arguments):
            return f"give {now}"
    return near(name, known)
