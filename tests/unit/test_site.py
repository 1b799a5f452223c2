"""The documentation as a site: it builds without a warning, names everything public, leads nowhere that is not there, and needs no network.
And its curves are those of the margins."""

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from helpers.pages import DOCS, ROOT

import marginkernels as mk
from marginkernels import compat, margins
from marginkernels.cli._libraries import LIBRARIES


class Page(HTMLParser):
    """What a page of the site has: the ids that a link may lead to, its links, and what a browser fetches to show it."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given["id"]} if "id" in given else set()
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.fetched += [given[name] for name in ("src", "srcset", "data") if name in given and tag != "div"]
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "modulepreload"):
            self.fetched.append(given["href"])


def public_names() -> set[str]:
    names = {f"marginkernels.{name}" for name in mk.__all__ if name not in ("__version__", "optim")}
    for module in (mk.optim, mk.distributed):
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    tested = {name for name, v in vars(mk.testing).items() if getattr(v, "__module__", "") == "marginkernels.testing"}
    names |= {f"marginkernels.testing.{name}" for name in tested if name[0] != "_"}
    return names | {f"{compat.__name__}.{key.shim}.{name}" for key in LIBRARIES.values() for some in key.sources.values() for name in some}


def faults(site: Path) -> list[str]:
    """What is wrong with a site that has been built."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    found = [f"{name} is in no page" for name in sorted(public_names() - set().union(*(page.ids for page in pages.values())))]
    found += [
        f"{page.relative_to(ROOT)} is not shown" for page in DOCS if not (site / page.relative_to(ROOT).with_suffix(".html")).exists()
    ]
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [
            f"{name} fetches {target}" for target in page.fetched if urlsplit(target).scheme not in ("", "data") or target[:2] == "//"
        ]
        for target in (*page.links, *page.fetched):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or target == "#":
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            if not there.is_file():
                found.append(f"{name}: no {target}")
            elif parts.fragment and there in pages and unquote(parts.fragment) not in pages[there].ids:
                found.append(f"{name}: no #{parts.fragment} in {there.name}")
    for path in (*site.rglob("*.css"), *site.rglob("*.svg")):
        if re.search(r"""(?:url\(|@import|href=)\s*["']?(?:https?:)?//""", path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(site)} fetches something")
    return found


def test_the_site(tmp_path):
    pytest.importorskip("sphinx")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-c", "docs", "-d", str(tmp_path / "doctrees"), "-W", "--keep-going", "-q", ".", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not faults(site)
    assert (site / "index.html").read_bytes() == (site / "README.html").read_bytes()
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert all(word in index for word in ("marginhead", "gradscal", "insightfac"))


def test_faults_are_found(tmp_path):
    """Each kind of fault in a site of one page."""
    (tmp_path / "a.html").write_text(
        '<a href="b.html">x</a><a href="#there">x</a><a href="#gone">x</a><p id="there"></p><script src="https://x.example/a.js"></script>'
        '<img src="//x.example/a.png"><img src="data:image/png;base64,AA=="><a href="https://x.example">x</a>'
    )
    (tmp_path / "a.css").write_text('@import "https://x.example/font.css";')
    found = faults(tmp_path)
    assert {text for text in found if text[:2] == "a."} == {
        "a.html: no b.html",
        "a.html: no #gone in a.html",
        "a.html fetches https://x.example/a.js",
        "a.html fetches //x.example/a.png",
        "a.css fetches something",
    }
    assert "marginkernels.ArcFace is in no page" in found
    assert "docs/losses.md is not shown" in found


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["figures"] = module
    spec.loader.exec_module(module)
    return module


NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def test_the_curves_are_those_of_the_margins(figures):
    """Each committed figure, number for number, within a fifth of a point."""
    assert {path.stem for path in figures.FOLDER.iterdir()} == set(figures.FIGURES)
    for name, figure in figures.FIGURES.items():
        committed, made = (figures.FOLDER / f"{name}.svg").read_text(), figures.drawn(*figure())
        assert NUMBER.sub("0", committed) == NUMBER.sub("0", made), f"{name}: run python docs/figures.py"
        pairs = zip(NUMBER.findall(committed), NUMBER.findall(made), strict=True)
        assert max(abs(float(a) - float(b)) for a, b in pairs) < 0.2, f"{name}: run python docs/figures.py"


def test_every_margin_has_its_curve(figures):
    shown: set[type] = set()
    for group in (figures.ADDITIVE, figures.MULTIPLICATIVE, figures.NORMS, figures.WEIGHTED):
        for named in group:
            value, slope = figures.target(named.margin, named.norm)
            for other in named.alike:
                for got, want in zip(figures.target(other, named.norm), (value, slope), strict=True):
                    assert torch.equal(got, want), (named.name, type(other).__name__)
            of = (named.margin, *named.alike)
            assert all(type(margin).__name__ in named.name for margin in of), named.name
            shown |= {type(margin) for margin in of}
    assert shown == set(margins.ALL)


def test_the_gradient_is_that_of_the_head(figures):
    """Where all other centers stand at a right angle to the row."""
    classes, scale = 50, 16.0
    margin = mk.ArcFace(scale, 0.5)
    weight = torch.eye(classes + 1, dtype=torch.float64)[:classes]
    figures_classes, figures.CLASSES = figures.CLASSES, classes
    try:
        want = figures.gradient(margin, scale)
    finally:
        figures.CLASSES = figures_classes
    for degrees in (20, 60, 100, 160):
        angle = torch.tensor(float(degrees), dtype=torch.float64).deg2rad().requires_grad_()
        row = angle.cos() * weight[0] + angle.sin() * torch.eye(classes + 1, dtype=torch.float64)[classes]
        (got,) = torch.autograd.grad(mk.margin_cross_entropy(row[None], weight, torch.tensor([0]), margin=margin), angle)
        assert float(got.abs()) == pytest.approx(float(want[degrees]), rel=1e-6)
