"""Bases from Debian's packages, as no registry of images may be reachable."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.container.buildah import Buildah
from tests.container.phases import execute
from tests.container.pip_settings import PipSettings

SUITE = "bookworm"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KEPT = "numpy==2.3.0"

# What NVIDIA's images bring that the Dockerfile has to cope with: a torch of their own in the system's Python,
# constraints for every pip that contradict ours, a user with uid 1000, and an entry point to go through.
LIKE_NVIDIAS = f"""
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN useradd --uid 1000 --create-home ubuntu
RUN mkdir -p /etc/pip /opt/nvidia && echo '{KEPT}' > /etc/pip/constraint.txt && \\
    printf '#!/bin/sh\\necho == base ==\\nexec "$@"\\n' > /opt/nvidia/nvidia_entrypoint.sh && \\
    chmod 755 /opt/nvidia/nvidia_entrypoint.sh
RUN apt-get update && apt-get install --yes --no-install-recommends python3-pip && rm -rf /var/lib/apt/lists/*
RUN --mount=type=secret,id=pip PIP_CONFIG_FILE=/run/secrets/pip \\
    python3 -m pip install --no-cache-dir torch==2.13.0 {KEPT}
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt
"""


def mirror() -> str:
    """The mirror that this machine's apt uses."""
    for path in [*Path("/etc/apt/sources.list.d").glob("debian*"), Path("/etc/apt/sources.list")]:
        if path.is_file() and (found := re.search(r"^(?:URIs:|deb)\s.*?(https?://\S+)", path.read_text(), re.M)):
            return found[1]
    return "http://deb.debian.org/debian"


def make_base(buildah: Buildah, tag: str) -> str:
    """Make an image with Debian's Python and nothing else."""
    root, context = buildah.work / "rootfs", buildah.work / "base"
    execute(["debootstrap", "--variant=minbase", "--include=ca-certificates,python3", SUITE, root, mirror()])
    context.mkdir(exist_ok=True)
    execute(["tar", "-C", root, "-cf", context / "base.tar", "."])
    shutil.rmtree(root)
    (context / "Dockerfile").write_text(f"FROM scratch\nADD base.tar /\nENV PATH={PATH}\n")
    buildah.build(context, tag)
    (context / "base.tar").unlink()
    return f"Debian {SUITE}, {buildah.size(tag)}"


def add_torch(buildah: Buildah, base: str, tag: str, pip: list[str]) -> str:
    """Make a base with a torch of its own, in the manner of NVIDIA's."""
    context = buildah.work / "like_nvidias"
    context.mkdir(exist_ok=True)
    (context / "Dockerfile").write_text(f"FROM {base}\n{LIKE_NVIDIAS}")
    buildah.build(context, tag, *pip)
    return buildah.size(tag)


def hand_in(settings: PipSettings, folder: Path) -> list[str]:
    """The options of a build that let it use this machine's pip settings."""
    secret = folder / "pip.conf"
    secret.touch(mode=0o600)
    secret.write_text(settings.text)
    return [
        f"--secret=id=pip,src={secret}",
        *(f"--volume={here}:{there}:ro" for here, there in settings.mounts.items()),
    ]
