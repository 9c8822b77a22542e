"""Hooks of mkdocs: the site has the tree of the repository, so one relative link works on GitHub and on the site."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PUBLISHED = (
    "*.md",
    "LICENSE",
    "docs/**/*",
    "ds_configs/**/*",
    "examples/*.[pyj]*",
    "launch/**/*",
    "tests/README.md",
    "benchmarks/README.md",
    "benchmarks/gpu/agreement.py",
)
"""What pages are made of, and what they link to."""
ROLE = re.compile(r":\w+:<code>~?([\w.]+)</code>")
"""A reference in a docstring, ``:func:`name```, as Markdown leaves it."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of ``docs`` by those of the repository, and add a page of the examples.

    Args:
        files: those of ``docs`` and of the theme.
        config: of the site.
    """
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted({path for pattern in PUBLISHED for path in ROOT.glob(pattern)}):
        if path.is_file() and path != Path(__file__) and "__pycache__" not in path.parts:
            name = str(path.relative_to(ROOT))
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, "examples/README.md", content=examples()))
    return files


def examples() -> str:
    """The page of the examples: every script as it is."""
    scripts = sorted((ROOT / "examples").glob("*.py"))
    return "\n".join(["# Examples\n", *(f"## {path.stem}\n\n```python\n{path.read_text()}```\n" for path in scripts)])


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turn what GitHub reads otherwise than Python-Markdown into what both read alike.

    A link to a folder leads to its page. Of the line that opens a block of code only the language is left: the rest is
    for the tests, except the path of an excerpt.
    """
    markdown = re.sub(r"\]\(([\w./-]+/)\)", r"](\1README.md)", markdown)
    markdown = re.sub(r"^(```\w+) excerpt (\S+)$", r'\1 title="\2"', markdown, flags=re.MULTILINE)
    return re.sub(r"^(```\w+) needs .*$", r"\1", markdown, flags=re.MULTILINE)


def on_page_content(html: str, **_: object) -> str:
    """Link the references of docstrings to what they name, where the site has it."""
    return ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
