"""The documentation as a site: ``make docs`` builds these Markdown pages, which read well on GitHub too, and a reference from the docstrings.

The root of the sources is that of the repository, so that a link from page to page is the same link here and there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sphinx.application import Sphinx

from marginkernels import __version__

#: Title of a part of the navigation -> its pages. A page that is in no part is an error of the build.
NAVIGATION = {
    "Start": ["docs/README"],
    "Use": [
        "docs/losses",
        "docs/distributed",
        "docs/fused_step",
        "docs/planning",
        "docs/numerics",
        "docs/backends",
        "docs/verification",
    ],
    "Switch": ["docs/switching"],
    "Reference": ["docs/reference/heads"],
    "Project": ["docs/benchmarking", "benchmarks/RESULTS", "docs/architecture", "CONTRIBUTING", "CHANGELOG"],
}

project, author, release = "marginkernels", "The marginkernels developers", __version__
html_title = f"marginkernels {release}"
copyright = "the marginkernels developers"

root_doc = "README"
include_patterns = ["*.md", "docs/**", "benchmarks/RESULTS.md"]
exclude_patterns = [".*", "build", "csrc", "dist", "examples", "marginkernels*", "runs", "site", "tests", "benchmarks/results"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"

# A heading's anchor is the one that GitHub gives it.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
nitpicky = True


def add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """The first page gets the navigation, which GitHub's readers do not see."""
    if name == root_doc:
        for part, pages in NAVIGATION.items():
            source[0] += "\n```{toctree}\n:hidden:\n:caption: " + part + "\n" + "\n".join(pages) + "\n```\n"


def add_index(app: Sphinx, error: Exception | None) -> None:
    """The first page again, under the name that a server looks for."""
    if error is None and app.builder.format == "html":
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
    app.connect("build-finished", add_index)
