"""Stands in for launch/pretrain.py where only its start and its end matter: it saves on SIGTERM, and starts at once.

program.py WHAT FOLDER: every rank reports its environment in FOLDER/START-RANK.json. WHAT is ``fail``, once all ranks
have reported (the first to fail ends the others), or ``wait`` for SIGTERM, after which it takes a few seconds and
writes FOLDER/START-RANK.saved.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

SECONDS_TO_SAVE = 3


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_NODEID")
    report = {"arguments": sys.argv[1:], **{name: int(os.environ[name]) for name in names}}
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    name = f"{start}-{report['RANK']}"
    part = folder / f"{name}.part"
    part.write_text(json.dumps(report))
    part.rename(folder / f"{name}.json")
    if what == "fail":
        while len(list(folder.glob(f"{start}-*.json"))) < report["WORLD_SIZE"]:
            time.sleep(0.05)
        sys.exit(7)
    while not asked:
        time.sleep(0.05)
    time.sleep(SECONDS_TO_SAVE)
    (folder / f"{name}.saved").touch()


if __name__ == "__main__":
    main()
