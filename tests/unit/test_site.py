"""The documentation as a site: it builds strictly, every link leads somewhere, nothing is fetched, the API is there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

import ds_lowrank
from ds_lowrank.__main__ import COMMANDS
from ds_lowrank.methods import METHODS
from tests.unit.pages import ROOT

pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
pytestmark = pytest.mark.slow

FETCHES = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}
"""The attribute of an element for which a browser sends a request without being asked."""
COUNTED = {"h1", "h2", "h3", "h4", "li", "table", "tr", "td", "th", "pre", "code", "img", "strong"}


@dataclass
class Page(HTMLParser):
    """What the tests read of one page: anchors, links, what a browser fetches, and the elements of its article."""

    text: str
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    elements: Counter[str] = field(default_factory=Counter)
    _within: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        self._within |= tag == "article"
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in FETCHES and FETCHES[tag] in given and given.get("rel") != "canonical":
            self.fetched.append(given[FETCHES[tag]])
        if self._within:
            self.elements[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        self._within &= tag != "article"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_and_every_anchor_leads_somewhere(pages):
    broken = []
    for path, page in pages.items():
        for link in (*page.links, *page.fetched):
            if urlsplit(link).scheme in {"http", "https"}:
                continue
            other, anchor = urldefrag(link)
            target = (path.parent / unquote(other)).resolve() if other else path
            if not target.is_file() or (anchor and target in pages and unquote(anchor) not in pages[target].anchors):
                broken.append((path.name, link))
    assert not broken


def test_no_page_fetches_anything_from_elsewhere(site, pages):
    assert not [link for page in pages.values() for link in page.fetched if urlsplit(link).netloc]
    styles = [path.read_text() for path in site.rglob("*.css")]
    assert styles
    assert not [style for style in styles if "@import" in style or "url(http" in style or "url(//" in style]


def test_every_page_of_the_documentation_is_published(pages, site):
    written = {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "ds_configs").glob("*.md")}
    names = {path.relative_to(ROOT).with_suffix(".html") for path in written}
    names = {name.with_name("index.html") if name.stem == "README" else name for name in names}
    assert names <= {path.relative_to(site) for path in pages}


def test_a_page_has_the_headings_lists_tables_and_code_that_github_shows(pages, site):
    markdown_it = pytest.importorskip("markdown_it")
    github = markdown_it.MarkdownIt("commonmark").enable("table")
    for path, page in pages.items():
        source = (ROOT / path.relative_to(site)).with_suffix(".md")
        source = source.with_name("README.md") if path.stem == "index" else source
        if "api" in path.parts or not source.is_file():
            continue
        expected = Page(f"<article>{github.render(source.read_text())}</article>").elements
        assert {tag: page.elements[tag] for tag in COUNTED} == {tag: expected[tag] for tag in COUNTED}, source


def of_the_api(pages, name: str) -> Page:
    return next(page for path, page in pages.items() if path.parts[-2:] == ("api", f"{name}.html"))


def test_the_api_has_every_public_name_with_its_docstring(pages):
    api = " ".join(" ".join(page.text.split()) for path, page in pages.items() if "api" in path.parts)
    anchors = {anchor for path, page in pages.items() if "api" in path.parts for anchor in page.anchors}
    for name in ds_lowrank.__all__:
        assert f"ds_lowrank.{name}" in anchors, name
        summary = getattr(ds_lowrank, name).__doc__.splitlines()[0]
        plain = max(summary.replace("``", "`").split("`")[::2], key=len).strip()  # the longest piece without code
        assert plain.replace("'", "&#39;") in api or plain in api, name


def test_the_api_has_every_option_of_every_method_and_every_command(pages):
    anchors = of_the_api(pages, "options").anchors
    for method in METHODS.values():
        if not method.__module__.startswith("ds_lowrank."):
            continue
        for kind in method.Options.__mro__:
            for key in vars(kind).get("__annotations__", {}).keys() & method.Options.model_fields.keys():
                assert f"{kind.__module__}.{kind.__qualname__}.{key}" in anchors, key
    commands = of_the_api(pages, "commands").anchors
    assert {f"ds_lowrank.commands.{name}" for name in COMMANDS} <= commands


def test_references_in_docstrings_are_links_or_code_and_never_raw(pages):
    raw = [path.name for path, page in pages.items() if "api" in path.parts and ":<code>" in page.text]
    assert not raw
