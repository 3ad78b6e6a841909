"""How Sphinx builds these pages; `tox -e docs` runs it with warnings as errors, without the network."""

from __future__ import annotations

import lightning_hetero

project = "lightning_hetero"
author = "the authors of lightning_hetero"
version = release = lightning_hetero.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lightning_hetero {version}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # what a hook of Lightning does is in Lightning's documentation
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_use_ivar = True

# examples in docstrings use the names of their own module
doctest_global_setup = """
from lightning_hetero.balance.tuning.advice import *
from lightning_hetero.balance.batch.batch_solver import *
from lightning_hetero.balance.pipeline.moves import *
from lightning_hetero.balance.pipeline.orders.order import *
from lightning_hetero.balance.pipeline.orders.proof import *
from lightning_hetero.balance.pipeline.simulation import *
from lightning_hetero.balance.tuning.prior import *
from lightning_hetero.balance.batch.sharding import *
from lightning_hetero.balance.pipeline.stage_solver import *
from lightning_hetero.balance.pipeline.stages import *
from lightning_hetero.balance.types import *
from lightning_hetero.balance.tuning.window import *
from lightning_hetero.testing import *
"""

# modules that must not import what they refer to by its short name
nitpick_ignore = [
    ("py:meth", "TuningSession.adopt_suggestion"),
    ("py:meth", "Rebalancer.to_dict"),
    ("py:class", "Kind"),  # an alias in the fields of a named tuple
]
# the pages of other projects are on the network
nitpick_ignore_regex = [
    (r"py:.*", r"(collections\.abc|datetime|lightning|random|torch)\..*"),
]
