"""Fine-tuning with every optimizer on the tasks that need no download: accuracy after equal steps, state, time.

python -m benchmarks.finetuning

launch/pretrain.py first makes a checkpoint from the standard library's source, as ``make pretrain`` does. Every run
starts from it, on one rank and one core, two runs at a time. All contenders are swept alike, on each task: three
learning rates (a first one, half and twice of it), and one beyond an end that is best, with one seed; the best of them
then with all seeds. The accuracy is that of the last evaluation, not the best one. *mean* is over tasks, each with the
mean of its seeds. *half* and *twice* are what the first seed gains at half and at twice the best rate.

*state bytes* covers all moments and bases: for the matrices of a low-rank method, what the method reports; for every
other trained element, two fp32 moments. It is that of the first task; another number of classes changes little. Runs
that a file of ``--json`` has are not repeated: a table may grow over days.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import Any

from benchmarks import runs
from benchmarks.common import Numbers, options, origin, table, write_json
from benchmarks.finetuning_contenders import CONTENDERS, MODEL, Contender, state_bytes
from benchmarks.runs import Records
from benchmarks.sweeps import KeptRuns, around, best_on_line
from ds_lowrank.data.built_in import BUILT_IN
from ds_lowrank.data.rows import open_rows

QUICKSTART = runs.ROOT / "ds_configs/galore_zero2.json"
PRETRAINING = Lock()
"""Of two runs that need a checkpoint, the first makes it."""
KEPT = ("step", "eval_accuracy", "eval_loss", "trainable_parameters", "lowrank/state_bytes", "seconds")


@dataclass(frozen=True)
class Setting:
    """One run: the name of a contender, a task, a learning rate and a seed."""

    optimizer: str
    task: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's files."""
        return f"{self.optimizer.replace(' ', '_')}_{self.task}_lr{self.lr:g}_seed{self.seed}"


def pretrain(work: Path, arguments: argparse.Namespace) -> Path:
    """Return the checkpoint that all runs start from, after making it if ``work`` has none."""
    output = work / f"pretrained_steps{arguments.pretrain_steps}"
    flags = {
        "model": MODEL, "cache": work / "cache", "sequence-length": arguments.max_length,
        "steps": arguments.pretrain_steps, "save-interval": 0,
        "global-batch-size": arguments.batch_size, "micro-batch-size": arguments.batch_size,
    }  # fmt: skip
    runs.launch_once("pretrain.py", json.loads(QUICKSTART.read_text())["optimizer"], output, flags, "--export")
    return output / "export"


def finetune(setting: Setting, contender: Contender, work: Path, arguments: argparse.Namespace) -> Records:
    """Return the last record of a run; one that is finished in ``work``, with the same optimizer, is not repeated."""
    with PRETRAINING:
        checkpoint = pretrain(work, arguments)
    optimizer = {"type": contender.type, "params": {**contender.params, "lr": setting.lr}}
    output = work / f"from{arguments.pretrain_steps}_steps{arguments.steps}" / setting.name
    flags = {
        "model": checkpoint, "max-length": arguments.max_length, "data": setting.task, "steps": arguments.steps,
        "seed": setting.seed, "save-interval": 0,
        "global-batch-size": arguments.batch_size, "micro-batch-size": arguments.batch_size,
    }  # fmt: skip
    runs.launch_once("finetune.py", optimizer, output, {**flags, **contender.flags})
    summary = json.loads((output / "summary.json").read_text())
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    print(f"{setting.name}: {summary['eval_accuracy']:.4f}", file=sys.stderr, flush=True)
    return [{**last, "trainable_parameters": summary["trainable_parameters"], "seconds": summary["seconds"]}]


class Table:
    """The runs of all contenders on all tasks, some of which may be known already.

    Args:
        work: The folder for all runs, and the model that they start from.
        arguments: The command line.
        kept: The runs, with the records of those that were made before.
    """

    def __init__(self, work: Path, arguments: argparse.Namespace, kept: KeptRuns[Setting]) -> None:
        self._work, self._arguments, self._kept = work, arguments, kept

    def accuracy(self, contender: Contender, setting: Setting) -> float:
        """Return the last accuracy of one run, which is made if it is not known."""
        make = partial(finetune, setting, contender, self._work, self._arguments)
        return float(self._kept.get(setting, make)[-1]["eval_accuracy"])

    def search(self, contender: Contender, task: str) -> Setting:
        """Sweep the learning rate with one seed, and run the best one with all of them."""
        setting = Setting(contender.name, task, contender.lr, self._arguments.seed)
        if self._arguments.quick:
            self.accuracy(contender, setting)
            return setting
        lr = best_on_line(
            contender.lr, lambda lr: -self.accuracy(contender, replace(setting, lr=lr)), self._arguments.more
        )
        for seed in range(self._arguments.seed, self._arguments.seed + self._arguments.seeds):
            self.accuracy(contender, replace(setting, lr=lr, seed=seed))
        return replace(setting, lr=lr)

    def last(self, setting: Setting) -> dict[str, Any] | None:
        """Return the last record of a run, or None if it was not made."""
        return self._kept.found[setting][-1] if setting in self._kept.found else None

    def seeds(self, setting: Setting) -> list[float]:
        """Return the last accuracies of a setting, one for each seed that was run."""
        found = self._kept.found
        return [found[s][-1]["eval_accuracy"] for s in found if replace(s, seed=setting.seed) == setting]


Won = Mapping[tuple[Contender, str], Setting]
"""The best setting of each contender on each task."""


def search_all(found: Table, contenders: Sequence[Contender], tasks: Sequence[str], jobs: int) -> Won:
    """Return the best settings; several sweeps are made at a time."""
    pairs = list(product(contenders, tasks))
    with ThreadPoolExecutor(jobs) as pool:
        settings = pool.map(lambda pair: found.search(*pair), pairs)
        return dict(zip(pairs, settings, strict=True))


def largest_class(task: str) -> float:
    """Return the share of the held-out examples that are in the most frequent class."""
    rows = open_rows(task, None, 0.1, 0).validation[""]
    return max(Counter(row["label"] for row in rows).values()) / len(rows)


def summary(found: Table, won: Won, contenders: Sequence[Contender], tasks: Sequence[str]) -> Numbers:
    """Return one record per contender, the highest mean first, and one for always predicting the largest class."""
    rows: Numbers = []
    for contender in contenders:
        settings = {task: won[contender, task] for task in tasks}
        records = [record for record in map(found.last, settings.values()) if record is not None]
        each = {short(task): mean(found.seeds(setting)) for task, setting in settings.items()}
        rows.append(
            {
                "optimizer": contender.name,
                **each,
                "mean": mean(each.values()),
                "trained": records[0]["trainable_parameters"],
                "state bytes": state_bytes(contender, records[0]),
                "seconds": mean(record["seconds"] for record in records),
            }
        )
    rows.sort(key=lambda row: -row["mean"])
    each = {short(task): largest_class(task) for task in tasks}
    nothing = {"trained": None, "state bytes": None, "seconds": None}
    return [*rows, {"optimizer": "largest class", **each, "mean": mean(each.values()), **nothing}]


def rates(found: Table, won: Won) -> Numbers:
    """Return one record per contender and task: the best learning rate, and what others gain."""
    rows: Numbers = []
    for (contender, task), setting in won.items():
        own, *beside = (found.last(replace(setting, lr=lr)) for lr in around(setting.lr))
        assert own is not None
        gains = [None if other is None else other["eval_accuracy"] - own["eval_accuracy"] for other in beside]
        rows.append(
            {
                "optimizer": contender.name,
                "task": short(task),
                "lr": setting.lr,
                "half": gains[0],
                "twice": gains[1],
                "seeds": ", ".join(f"{accuracy:.3f}" for accuracy in found.seeds(setting)),
            }
        )
    return rows


def short(task: str) -> str:
    """Return the name of a task in a column's head."""
    return task.removeprefix("stdlib-")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the runs here; only missing ones are run")
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=118, help="per run; the default is one epoch of the first task")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences")
    parser.add_argument("--max-length", type=int, default=128, help="tokens")
    parser.add_argument("--seeds", type=int, default=2, help="of the best learning rate")
    parser.add_argument("--more", type=int, default=1, help="at most this many rates beyond the ends of a sweep")
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"contenders, of {', '.join(names)}")
    parser.add_argument("--tasks", nargs="+", choices=BUILT_IN, metavar="NAME", help=f"of {', '.join(BUILT_IN)}")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs, one core each")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(steps=5, pretrain_steps=5, seeds=1, more=0)
    return arguments


def main() -> None:
    """Measure and report."""
    arguments = parse()
    contenders = [c for c in CONTENDERS if arguments.only is None or c.name in arguments.only]
    tasks = [task for task in BUILT_IN if arguments.tasks is None or task in arguments.tasks]
    shared = {key: getattr(arguments, key) for key in ("pretrain_steps", "steps", "batch_size", "max_length")}
    shared["python"] = ".".join(platform.python_version_tuple()[:2])  # on which the examples depend
    kept = KeptRuns(arguments.json, shared, Setting, KEPT)
    with runs.working_folder(arguments.work) as work:
        found = Table(work, arguments, kept)
        won = search_all(found, contenders, tasks, arguments.jobs)
    numbers, swept = summary(found, won, contenders, tasks), rates(found, won)
    print(table(numbers), table(swept), sep="\n\n")
    if arguments.json is not None:
        write_json(arguments.json, {**origin(arguments), "numbers": numbers, "rates": swept, **kept.as_record()})


if __name__ == "__main__":
    main()
