"""The documentation as a site: ``make docs`` builds these Markdown pages, which are for GitHub too, and a reference from the docstrings.

The root of the sources is that of the repository, so that a link from page to page is the same link here and there.
"""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

from sphinx.application import Sphinx

import marginkernels

#: Title of a part of the navigation -> its pages. A page that is in no part is an error of the build.
NAVIGATION = {
    "Start": ["docs/start", "docs/installing", "docs/training", "docs/switching", "docs/faq", "All pages <docs/README>"],
    "Losses": ["docs/choosing", "docs/margin_and_scale", "docs/losses", "docs/own_loss", "docs/study", "examples/study/README"],
    "Many identities": ["docs/planning", "docs/distributed", "docs/fused_step"],
    "Running it": ["docs/numerics", "docs/backends", "docs/verification"],
    "Reference": ["docs/reference/index", "docs/commands"],
    "Project": ["docs/benchmarking", "benchmarks/RESULTS", "docs/architecture", "CONTRIBUTING", "CHANGELOG"],
}
#: Pages under another in the navigation.
UNDER = {"docs/switching": "switching-*"}

project, author, release = "marginkernels", "The marginkernels developers", marginkernels.__version__
copyright = "the marginkernels developers"
html_title = f"marginkernels {release}"

root_doc = "README"
include_patterns = ["*.md", "docs/**", "benchmarks/RESULTS.md", "examples/study/README.md"]
exclude_patterns = [".*", "build", "csrc", "dist", "marginkernels*", "runs", "site", "tests", "benchmarks/results"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# A theme without fonts or scripts from elsewhere.
html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
pygments_dark_style = "github-dark"

# A heading's anchor is the one that GitHub gives it.
myst_heading_anchors = 4

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_mock_imports = ["mmpretrain", "oml", "speechbrain", "wespeaker"]
napoleon_custom_sections = [("Buffers", "attributes"), ("Class attributes a subclass may set", "params_style"), "Shapes"]
# What is returned is told in prose, whose colons are not those of a type.
napoleon_custom_sections += ["With a process group of R ranks", "Returns"]

# Every name that a docstring refers to must be in the reference, but for those of other libraries.
python_maximum_signature_line_length = 88
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|numpy|collections|pathlib|os|pickle|pytorch_metric_learning)\..*|Tensor|.*\.Key")]


def name_as_users_do() -> None:
    """What ``mk.ArcFace`` is defined in is nobody's concern: signatures and links say ``marginkernels.ArcFace``."""
    for module in ("marginkernels", "marginkernels.optim", "marginkernels.distributed", "marginkernels.backend.triton"):
        package = importlib.import_module(module)
        for name in package.__all__:
            found = getattr(package, name)
            if getattr(found, "__module__", "").startswith(module):
                found.__module__ = module


def for_the_site(app: Sphinx, name: str, source: list[str]) -> None:
    """What differs from what GitHub shows: a link that names a file names its title, and the pages that are above others list them."""
    source[0] = re.sub(r"\[[\w./-]+\.md\]\(", "[](", source[0])
    if name == root_doc:
        for part, pages in NAVIGATION.items():
            source[0] += "\n```{toctree}\n:hidden:\n:caption: " + part + "\n" + "\n".join(pages) + "\n```\n"
    if name in UNDER:
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n" + UNDER[name] + "\n```\n"


def add_index(app: Sphinx, error: Exception | None) -> None:
    """The first page again, under the name that a server looks for."""
    if error is None and app.builder.format == "html":
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    name_as_users_do()
    app.connect("source-read", for_the_site)
    app.connect("build-finished", add_index)
