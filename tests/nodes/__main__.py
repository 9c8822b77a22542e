"""``python -m tests.nodes [WORDS]``: try every launcher and every loss on two nodes, which are made here. Needs root.

With words, only the trials whose names contain them all.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path

from tests.nodes.cluster import missing
from tests.nodes.trials import trials


def main(words: list[str]) -> int:
    """Run the trials; the exit code is the number of those that failed."""
    lacking = missing()
    if lacking is not None:
        print(f"python -m tests.nodes {lacking}")
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing stays behind
    failed = 0
    for trial in trials():
        if not all(word in trial.name for word in words):
            continue
        with tempfile.TemporaryDirectory(prefix="nodes-") as folder:
            try:
                found = trial.run(Path(folder) / "cluster")
            except AssertionError as error:
                failed += 1
                found = f"FAILED: {error}"
        print(f"{trial.name}: {found}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
