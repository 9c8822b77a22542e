"""Write what the image installs: requirements.txt and constraints.txt, from those of the project.

A base such as NVIDIA's PyTorch container has its own torch, built for its CUDA, and libraries that were built for that
torch. pip must not replace them, so the constraints name the versions that are there instead of the project's.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

BUILT_FOR_EACH_OTHER = re.compile(r"(torch|torch(vision|audio|ao)|(pytorch-)?triton|transformer-engine.*|flash-attn.*)")
"""torch, and what is built for one torch; only kept together with it."""
OF_CUDA = re.compile(r"(nvidia|cuda)-.*")
"""CUDA's libraries as packages."""


def canonical(name: str) -> str:
    """Return the name of a distribution as indexes compare it: in lower case, with hyphens."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(project: Mapping[str, Any], extras: Iterable[str]) -> list[str]:
    """List what the project and some of its extras require, and what builds it, so that the code needs no download.

    Args:
        project: the content of pyproject.toml.
        extras: names of optional dependencies.

    Raises:
        SystemExit: the project has no such extra.
    """
    optional = project["project"]["optional-dependencies"]
    missing = sorted(set(extras) - optional.keys())
    if missing:
        raise SystemExit(
            f"error: no extra {', '.join(missing)} in pyproject.toml: it has {', '.join(sorted(optional))}"
        )
    groups = [project["build-system"]["requires"], project["project"]["dependencies"], *(optional[e] for e in extras)]
    return sorted({requirement for group in groups for requirement in group})


def kept(installed: Mapping[str, str]) -> dict[str, str]:
    """Select what must stay as the base has it.

    Args:
        installed: canonical names of the base's distributions, and their versions.

    Returns:
        The same of torch and of what belongs to it; nothing if the base has no torch.
    """
    if "torch" not in installed:
        return {}
    return {
        name: version
        for name, version in sorted(installed.items())
        if BUILT_FOR_EACH_OTHER.fullmatch(name) or OF_CUDA.fullmatch(name)
    }


def constraints(pinned: str, kept_versions: Mapping[str, str]) -> list[str]:
    """Put the versions of the base in the place of the project's.

    Args:
        pinned: the text of the project's constraints.txt.
        kept_versions: canonical names and versions that must stay.
    """
    lines = [line for line in pinned.splitlines() if line and not line.startswith("#")]
    others = [line for line in lines if canonical(line.partition("==")[0]) not in kept_versions]
    return [*others, *(f"{name}=={version}" for name, version in kept_versions.items())]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extras", required=True, help="extras of pyproject.toml, with commas between them")
    parser.add_argument("--output", type=Path, required=True, help="the folder for both files")
    arguments = parser.parse_args()
    installed = {canonical(found.name): found.version for found in distributions()}
    stays = kept(installed)
    wanted = requirements(tomllib.loads(Path("pyproject.toml").read_text()), arguments.extras.split(","))
    versions = constraints(Path("constraints.txt").read_text(), stays)
    (arguments.output / "requirements.txt").write_text("".join(f"{line}\n" for line in wanted))
    (arguments.output / "constraints.txt").write_text("".join(f"{line}\n" for line in versions))
    told = ", ".join(f"{name} {version}" for name, version in stays.items())
    print(f"kept from the base: {told or 'nothing, as it has no torch'}")


if __name__ == "__main__":
    main()
