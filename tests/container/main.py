"""The trial: base, build, a build after a change of the code, and what the image does."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.container import checks, debian, pip_settings
from tests.container.buildah import Buildah, Container, storage_driver
from tests.container.nodes import two_nodes
from tests.container.phases import Phases, TrialError, expect

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"debootstrap": "debootstrap", "buildah": "buildah", "ip": "iproute2", "ssh-keygen": "openssh-client"}
"""What is needed, and Debian's packages that have it."""
NOT_COPIED = (".git", ".venv", "runs", "build", "__pycache__", ".*_cache", ".hypothesis")


def missing() -> str | None:
    """What this machine lacks, in one line."""
    if os.geteuid() != 0:
        return "it needs root: debootstrap and buildah make folders that belong to others"
    packages = sorted(package for program, package in PROGRAMS.items() if shutil.which(program) is None)
    return f"Debian's {', '.join(packages)} are missing: apt-get install {' '.join(packages)}" if packages else None


def copy_of_the_checkout(work: Path) -> Path:
    """The folder that is built from: the checkout, and a file that .dockerignore must keep out."""
    context = work / "context"
    shutil.rmtree(context, ignore_errors=True)
    shutil.copytree(ROOT, context, ignore=shutil.ignore_patterns(*NOT_COPIED))
    (context / checks.NOT_FOR_THE_IMAGE).write_text("TOKEN=secret\n")
    return context


class Trial:
    """The parts that make images.

    Attributes:
        buildah: the command, with its storage.
        like_nvidias: whether the base has a torch of its own.
    """

    def __init__(self, buildah: Buildah, like_nvidias: bool) -> None:
        self.buildah = buildah
        self.settings = pip_settings.of_this_machine()
        self.pip = debian.hand_in(self.settings, buildah.work)
        self.base = "localhost/debian-python"
        self.like_nvidias = like_nvidias
        self.image = "localhost/ds-lowrank:trial"

    def make_base(self) -> str:
        if self.buildah.has(self.base):
            return "is there"
        return debian.make_base(self.buildah, self.base)

    def add_torch(self) -> str:
        result = debian.add_torch(self.buildah, self.base, "localhost/debian-torch", self.pip)
        self.base = "localhost/debian-torch"
        return result

    def build(self) -> str:
        self.context = copy_of_the_checkout(self.buildah.work)
        said = self.buildah.build(self.context, self.image, f"--build-arg=BASE={self.base}", *self.pip)
        kept = next((line for line in said.splitlines() if line.startswith("kept from the base")), "layers were there")
        return kept if len(kept) < 80 else f"{kept[:77]}..."

    def build_again(self) -> str:
        """After a change of the code no package is installed."""
        with (self.context / "ds_lowrank/errors.py").open("a") as file:
            file.write("# changed\n")
        said = self.buildah.build(self.context, self.image, f"--build-arg=BASE={self.base}", *self.pip)
        expect("Collecting" not in said, f"{said}\npackages were installed again")
        expect("Successfully installed ds-lowrank" in said, f"{said}\nthe change is not in the image")
        return "no package installed"


def run(trial: Trial, phases: Phases) -> None:
    """Everything, in order."""
    work = trial.buildah.work
    phases.run("base", trial.make_base)
    if trial.like_nvidias:
        phases.run("base with torch", trial.add_torch)
    phases.run("build", trial.build)
    phases.run("build, code changed", trial.build_again)
    container = Container(trial.buildah, trial.image)
    phases.run("what is in it", lambda: checks.contents(container, trial.settings.places))
    if trial.like_nvidias:
        phases.run("torch", lambda: checks.torch_of_the_base(container))
    phases.run("no command", lambda: checks.usage(container))
    phases.run("doctor", lambda: container.run("python", "-m", "ds_lowrank", "doctor").splitlines()[-1])
    phases.run("quick start, 10 steps", lambda: checks.quick_start(container, checks.folder_for(work, "runs")))
    phases.run("smoke", lambda: checks.smoke(container))
    phases.run("smoke, unknown uid, 1 rank", lambda: checks.smoke(container, checks.STRANGER, "--ranks", "1"))
    phases.run("stop, no handler", lambda: checks.stop_without_handler(container))
    phases.run("stop, torchrun", lambda: checks.stop(container, checks.folder_for(work, "stopped")))
    phases.run("two nodes", lambda: two_nodes(container, work))


def main() -> int:
    """Read the command line and run; the exit code."""
    parser = argparse.ArgumentParser(prog="build_and_run", description="Build the image for CPUs, and run it.")
    parser.add_argument("--work", type=Path, help="keep images and layers in this folder, and use those that are there")
    parser.add_argument("--like-nvidias", action="store_true", help="a base that has a torch of its own, and more")
    arguments = parser.parse_args()
    if lack := missing():
        print(f"error: build_and_run cannot run here: {lack}", file=sys.stderr)
        return 1
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="ds-lowrank-image-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    buildah = Buildah(work, storage_driver(work))
    phases = Phases()
    try:
        run(Trial(buildah, arguments.like_nvidias), phases)
    except TrialError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        (work / "pip.conf").unlink(missing_ok=True)
        if arguments.work is None:
            buildah.remove()
        else:
            buildah("rm", "--all")
    print(f"{'all':<28}{sum(phases.seconds.values()):7.1f} s  storage: {buildah.driver}")
    return 0
