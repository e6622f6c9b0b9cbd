"""One colour per optimizer, the same in every report, notebook and picture; and how pictures look."""

# Okabe and Ito's colour-blind-safe colours, for the optimizers that are compared most.
COLOURS = {
    "adamw": "#000000",
    "muon": "#0072B2",
    "soap": "#D55E00",
    "shampoo": "#009E73",
    "lion": "#CC79A7",
    "sgd": "#E69F00",
    "soap_muon": "#56B4E9",
    "kl_shampoo": "#7F5A0B",
    "adam": "#5F5F5F",
    "rmsprop": "#A5480A",
    "adagrad": "#8C6BB1",
    "adan": "#117733",
    "ademamix": "#332288",
    "mars": "#882255",
    "sophia_g": "#44AA99",
    "schedule_free_adamw": "#999933",
}
"""Colours by the name of the optimizer, as `ravine.names()` has it."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, for whatever else a picture compares, in turn."""
PICTURES = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
"""How lessons draw, for ``matplotlib.pyplot.rcParams.update``."""
OTHERS = ("#4477AA", "#AA3377", "#228833", "#BB5566", "#777777")
"""For names that `COLOURS` lacks, in turn."""


def colour(name: str) -> str:
    """The colour of an optimizer.

    Args:
      name: as in ``ravine.names()``; for a name that the table lacks, always the same of five others.

    Example:
      >>> from ravine.training.colours import colour
      >>> colour("muon"), colour("my_own") == colour("my_own")
      ('#0072B2', True)
    """
    return COLOURS.get(name) or OTHERS[sum(name.encode()) % len(OTHERS)]
