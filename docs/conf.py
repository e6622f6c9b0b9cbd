"""Sphinx's configuration; `make docs` builds the site from the pages in `docs/` and the notebooks."""

import os
from importlib import metadata

project = "Ravine"
author = "the authors of Ravine"
copyright = "2026, the authors of Ravine"
release = version = metadata.version("ravine")

# The source folder is the root of the repository, so that a relative link works here and on GitHub.
root_doc = "docs/index"
include_patterns = ["docs/**.md", "notebooks/*.ipynb"]
html_extra_path = ["_extra"]  # index.html, which leads to docs/index.html

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # MathJax is part of the site: reading needs no network
]

myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 3
# Outputs are committed, and `make notebooks` compares them with a fresh run.
nb_execution_mode = "off"
nb_merge_streams = True

default_role = "py:obj"
add_module_names = False
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# Links into other projects' documentation need the network: `INTERSPHINX=1 make docs`.
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
    }
    if os.environ.get("INTERSPHINX")
    else {}
)

# `make linkcheck`; links within the site are checked by `make docs`.
linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_workers = 8
linkcheck_rate_limit_timeout = 60
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]  # drawn by scripts
linkcheck_report_timeouts_as_broken = False

html_theme = "furo"
html_title = "Ravine"
html_static_path = ["_static"]
html_css_files = ["ravine.css"]
html_show_sourcelink = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
