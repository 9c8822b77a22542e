"""Seconds per GiB that a checkpoint's safety costs: its checksum, and waiting for the disk.

python -m benchmarks.checkpoint_files --work runs/checkpoint_files

A file of ``torch.save`` is written, flushed to the disk and read for its SHA-256, in turns. *Write* is what a save
costs anyway, *flush* and *checksum* are added to it; resuming adds a checksum. The file is still in memory when it is
read, as it is right after a save.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.common import Numbers, interleaved, medians, options, report
from ds_lowrank.checkpoint.disk import flush, sha256


def measure(work: Path, mebibytes: int, repeats: int) -> Numbers:
    """Return the seconds per GiB of each part.

    Args:
        work: a folder on the disk to measure.
        mebibytes: the size of the file.
        repeats: how often each part is measured.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / "states.pt"
    state = {"weights": torch.ones(mebibytes * 2**18)}
    parts = {
        "write": lambda: torch.save(state, path),
        "flush": lambda: flush(path),
        "checksum": lambda: sha256(path),
    }
    seconds = medians(interleaved(parts, repeats))
    path.unlink()
    return [{"part": name, "seconds per GiB": taken * 1024 / mebibytes} for name, taken in seconds.items()]


def main() -> None:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/checkpoint_files"), metavar="DIR")
    arguments = parser.parse_args()
    size, repeats = (16, 1) if arguments.quick else (1024, 5)
    torch.set_num_threads(1)
    report(measure(arguments.work, size, repeats), arguments)


if __name__ == "__main__":
    main()
