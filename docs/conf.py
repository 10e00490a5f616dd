"""Sphinx configuration; build with `make docs`."""

from ebu_optim import __version__

project = "ebu_optim"
author = "The ebu_optim authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and meanings; signatures show the defaults
napoleon_use_rtype = False
exclude_patterns = ["_build", "evidence", "results/*"]
nitpicky = False
html_theme = "furo"
html_title = f"ebu_optim {version}"
