"""Try every fault, and print how each ended: ``python -m benchmarks.faults``.

All take about an hour on two cores; ``--subjects damage kills`` tries some, and ``--compact`` the selection that
``make test`` runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from pathlib import Path

from benchmarks.faults.trial import Outcome, Trial

SUBJECTS = {
    "damage": "damaged checkpoints",
    "kills": "kills, signals and full disks",
    "configurations": "malformed configurations and flags",
    "data": "bad data and models",
}
"""The modules with trials, and what each tries."""


def main() -> int:
    """Run the trials that the command line names; the exit code says whether all faults were handled."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--compact", action="store_true", help="only the trials that the tests run")
    parser.add_argument("--output", type=Path, help="a JSON file for all outcomes")
    arguments = parser.parse_args()
    found: dict[str, dict[str, Outcome]] = {}
    for subject in arguments.subjects:
        trials: list[Trial] = import_module(f"benchmarks.faults.{subject}").trials()
        chosen = [trial for trial in trials if trial.compact or not arguments.compact]
        started = time.perf_counter()
        found[subject] = {trial.name: _tried(trial) for trial in chosen}
        _report(subject, found[subject], time.perf_counter() - started)
    if arguments.output is not None:
        text = {subject: {name: vars(one) for name, one in of.items()} for subject, of in found.items()}
        arguments.output.write_text(json.dumps(text, indent=2) + "\n")
    return int(any(not outcome.is_acceptable for of in found.values() for outcome in of.values()))


def _tried(trial: Trial) -> Outcome:
    """Run one trial in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="faults") as directory:
        folder = Path(directory, "run")
        folder.mkdir()
        return trial.run(folder)


def _report(subject: str, outcomes: dict[str, Outcome], seconds: float) -> None:
    counts = Counter(outcome.verdict for outcome in outcomes.values())
    print(f"{SUBJECTS[subject]}: {len(outcomes)} tried in {seconds:.0f} s")
    for verdict, count in counts.most_common():
        print(f"  {count:4d}  {verdict}")
    for name, outcome in outcomes.items():
        if not outcome.is_acceptable:
            print(f"  {name}: {outcome.verdict}: {outcome.detail}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
