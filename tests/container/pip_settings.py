"""Where pip finds packages on this machine, handed into a build without becoming part of the image.

A build knows nothing of this machine's pip.conf, PIP_* variables, certificates and folders of packages. They become one
pip.conf, given as a secret, and read-only mounts.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HANDED_ON = {
    *("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy"),
    *("cert", "client-cert", "timeout", "default-timeout", "retries"),
}
"""Settings about where packages come from; constraints and the like are the image's own."""


@dataclass(frozen=True)
class PipSettings:
    """The settings that are handed on.

    Attributes:
        values: by key; words are separated by single spaces.
    """

    values: dict[str, str]

    @property
    def text(self) -> str:
        """A pip.conf with them, for a build."""
        text = "[global]\n" + "".join(f"{key} = {value}\n" for key, value in sorted(self.values.items()))
        for path, mounted in self.mounts.items():
            text = re.sub(rf"(?<=[ /]){re.escape(str(path))}(?=[/\s])", mounted, text)
        return text

    @property
    def mounts(self) -> dict[Path, str]:
        """The folders and files on this machine that they name, and where a build finds them.

        An empty folder stays in an image where something was mounted, so these places are named after nothing here.
        """
        words = {word for value in self.values.values() for word in value.split()}
        paths = sorted({path for word in words if (path := local(word)) is not None})
        return {path: f"/run/pip/{number}" for number, path in enumerate(paths)}

    @property
    def places(self) -> list[str]:
        """Where packages come from: what must not be found in the image."""
        keys = ("index-url", "extra-index-url", "find-links", "proxy")
        words = [word for key in keys for word in self.values.get(key, "").split()]
        return [word for word in words if "/pypi.org/" not in word]


def of_this_machine() -> PipSettings:
    """Ask pip, which merges its files and its variables."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    return parse(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)


def parse(listed: str) -> PipSettings:
    """Read what ``pip config list`` prints: ``SECTION.KEY='VALUE'``, with ``:env:`` as the section of variables."""
    settings: dict[str, str] = {}
    lines = [line.partition("=") for line in listed.splitlines() if "=" in line]
    for name, _, value in sorted(lines, key=lambda line: line[0].startswith(":env:")):  # variables win
        key = name.rpartition(".")[2]
        if key in HANDED_ON:
            settings[key] = " ".join(ast.literal_eval(value).split())
    return PipSettings(settings)


def local(word: str) -> Path | None:
    """The folder or file that a setting names on this machine, if any."""
    path = Path(word.removeprefix("file://"))
    if not path.is_absolute() or not path.exists():
        return None
    # The pages of an index, conventionally in a folder "simple", link to files beside that folder.
    return path.parent if path.name == "simple" else path
