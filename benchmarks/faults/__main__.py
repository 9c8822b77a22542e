"""Try every fault, and print how each ended: ``python -m benchmarks.faults``.

All take about ten minutes on two cores; ``--subjects damage kills`` tries some, and ``--quick`` the selection that
``make test`` runs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from statistics import median

from benchmarks.common import hardware, options, provenance, write_json
from benchmarks.faults.trial import Outcome, Trial

SUBJECTS = {
    "damage": "damaged checkpoints",
    "kills": "kills, signals and full disks",
    "moves": "kills, after which the run is finished on another grid",
    "one_rank": "errors of one rank alone",
    "hangs": "ranks that stop answering",
    "configurations": "malformed configurations and flags",
    "data": "bad data and models",
}
"""The modules with trials, and what each tries."""


def main() -> int:
    """Run the trials that the command line names; the exit code says whether all faults were handled."""
    parser = options(__doc__)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--trials", type=int, metavar="N", help="at most so many of each subject")
    arguments = parser.parse_args()
    found: dict[str, dict[str, tuple[Outcome, float]]] = {}
    for subject in arguments.subjects:
        trials: list[Trial] = import_module(f"benchmarks.faults.{subject}").trials()
        chosen = [trial for trial in trials if trial.compact or not arguments.quick]
        found[subject] = {trial.name: _tried(trial) for trial in chosen[: arguments.trials]}
        _report(subject, found[subject])
    if arguments.json is not None:
        tried = {
            subject: {"trials": len(of), "verdicts": _verdicts(of), "median_seconds": _median_seconds(of)}
            for subject, of in found.items()
        }
        starts = {name: one for of in found.values() for name, one in of.items() if name.startswith("started: ")}
        record = {"hardware": hardware(), "refused_start_median_seconds": _median_seconds(starts), "subjects": tried}
        write_json(arguments.json, {**provenance("benchmarks.faults", arguments), **record})
    return int(any(not outcome.is_acceptable for of in found.values() for outcome, _ in of.values()))


def _tried(trial: Trial) -> tuple[Outcome, float]:
    """Run one trial in a folder of its own; its outcome, and how many seconds it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults") as directory:
        folder = Path(directory, "run")
        folder.mkdir()
        return trial.run(folder), time.perf_counter() - started


def _verdicts(found: dict[str, tuple[Outcome, float]]) -> dict[str, int]:
    return dict(Counter(outcome.verdict for outcome, _ in found.values()).most_common())


def _median_seconds(found: dict[str, tuple[Outcome, float]]) -> float:
    return round(median([seconds for _, seconds in found.values()] or [0.0]), 3)


def _report(subject: str, found: dict[str, tuple[Outcome, float]]) -> None:
    print(f"{SUBJECTS[subject]}: {len(found)} tried, {_median_seconds(found)} s each (median)")
    for verdict, count in _verdicts(found).items():
        print(f"  {count:4d}  {verdict}")
    for name, (outcome, _) in found.items():
        if not outcome.is_acceptable:
            print(f"  {name}: {outcome.verdict}: {outcome.detail}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
