"""buildah without a daemon, with a storage of its own: images are built and run here, and nowhere else."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.container.phases import TrialError, execute

USER = "1000:1000"


def storage_driver(work: Path) -> str:
    """overlay where the kernel can put one on this folder, else vfs, which copies every layer."""
    below = subprocess.run(["stat", "--file-system", "--format=%T", work], text=True, stdout=subprocess.PIPE).stdout
    supported = "overlay" in Path("/proc/filesystems").read_text() and "overlay" not in below
    return "overlay" if supported else "vfs"


@dataclass
class Buildah:
    """The command with its storage.

    Attributes:
        work: an empty folder, or one of an earlier trial.
        driver: how layers are stored.
    """

    work: Path
    driver: str
    command: list[str] = field(init=False)

    def __post_init__(self) -> None:
        folders = ["--root", str(self.work / "storage"), "--runroot", str(self.work / "run")]
        self.command = ["buildah", *folders, "--storage-driver", self.driver]

    def __call__(self, *words: str | Path, **options: object) -> str:
        return execute([*self.command, *words], **options)

    def build(self, context: Path, tag: str, *options: str | Path) -> str:
        """Build an image; what was printed."""
        return self("build", "--isolation", "chroot", "--layers", "--tag", tag, *options, context)

    def has(self, tag: str) -> bool:
        try:
            self("inspect", "--type", "image", tag)
        except TrialError:
            return False
        return True

    def configuration(self, tag: str) -> dict[str, object]:
        """The image's configuration: User, Env, Entrypoint, Labels and so on."""
        found: dict[str, object] = json.loads(self("inspect", "--type", "image", tag))["OCIv1"]["config"]
        return found

    def size(self, tag: str) -> str:
        (size,) = self("images", "--format", "{{.Size}}", tag).split("\n")[:1]
        return size

    def remove(self) -> None:
        """Remove the containers, and the folder unless something is still mounted in it."""
        self("rm", "--all")
        mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        # What overlay itself leaves mounted has nothing of this machine in it.
        storage = self.work / "storage"
        for path in {path for path in mounted if Path(path).is_relative_to(storage)}:
            execute(["umount", path])
        mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        if not any(Path(path).is_relative_to(self.work) for path in mounted):
            shutil.rmtree(self.work)


@dataclass
class Container:
    """A container of an image, run as ``docker run`` would: by its entry point, as its user."""

    buildah: Buildah
    image: str
    name: str = field(init=False)
    entrypoint: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.buildah("from", self.image).split()[-1]
        self.entrypoint = list(self.buildah.configuration(self.image)["Entrypoint"])  # type: ignore[call-overload]

    def command(
        self, words: Sequence[str], user: str = USER, mounts: Mapping[Path, str] | None = None, **variables: str
    ) -> list[str]:
        """The command that runs a command in the container; mounts are folders here and their places there."""
        options = ["--isolation", "chroot", "--user", user]
        options += [f"--volume={source}:{target}" for source, target in (mounts or {}).items()]
        options += [f"--env={name}={value}" for name, value in variables.items()]
        return [*self.buildah.command, "run", *options, self.name, "--", *self.entrypoint, *words]

    def run(self, *words: str, **options: object) -> str:
        """Run a command; what it printed."""
        return execute(self.command(words, **options))  # type: ignore[arg-type]
