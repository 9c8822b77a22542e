"""Every method against AdamW: validation loss after the same tokens, how it depends on the rate, state, time.

python -m benchmarks.methods

Every run is launch/pretrain.py on one rank and one core, two runs at a time, on the standard library's source. AdamW is
swept first: the learning rate of everything, then this rate and a factor on that of the matrices, by factors of two,
until each of the six neighbours is worse. What is not projected takes AdamW's best rate in every run. Each method's
factor on the matrices' rate is then swept alike, by factors of two, beyond the ends of the sweep while an end is best.
The sweep has one seed, the best factor has all of them: *loss* is their mean, with its standard error. *above AdamW* is
the mean of the differences within a seed, which decides the weights' start and the order of the data, and has a
standard error of its own. *half* and *twice* are what the first seed loses at half and at twice the best rate.

*state bytes* covers the projected matrices at the end. *step* is a whole training step, amortised over a refresh
interval; each method is timed in turns with AdamW, in a process of its own, and a ratio is to AdamW there. Runs that a
file of ``--json`` has are not repeated: a table may grow over days.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import runs
from benchmarks.common import Numbers, options, origin, write_json
from benchmarks.common import table as as_markdown
from benchmarks.contenders import GAP, Contender, contenders
from benchmarks.method_times import StepTime, time_in_turns
from benchmarks.plots import draw_methods
from benchmarks.runs import Found, Setting, final
from benchmarks.sweeps import KeptRuns, around, best_on_line
from ds_lowrank.training.param_groups import matrix_groups

ADAMW_LRS = (0.02, 0.04, 0.08, 0.16)
NEIGHBOURS = ((2, 1), (1 / 2, 1), (1, 2), (1, 1 / 2), (2, 1 / 2), (1 / 2, 2))
"""Factors on AdamW's rate of everything, and on the factor for the matrices."""
KEPT = ("step", "eval_loss", "lowrank/state_bytes", "lowrank/mean_rank")
SIZES = {"small": "llama_9m", "medium": "llama_20m"}
"""Models by the size that ``--size`` names; with a vocabulary of 4096 they have 1.8 and 5.3 million parameters."""


class Table:
    """The runs of all contenders, some of which may be known already.

    Args:
        work: The folder for all runs.
        arguments: The command line.
        kept: The runs, with the records of those that were made before.
    """

    def __init__(self, work: Path, arguments: argparse.Namespace, kept: KeptRuns[Setting]) -> None:
        self._work, self._arguments, self._kept = work, arguments, kept

    @property
    def found(self) -> Found:
        """The records of all runs, by setting."""
        return self._kept.found

    def run(self, contender: Contender, lr: float, scale: float, seed: int) -> float:
        """Return the final loss of one run, which is made if it is not known."""
        setting = Setting(contender.name, lr, scale, seed)
        optimizer, factor = contender.optimizer(lr, scale), None if contender.has_scale else scale
        make = partial(runs.train, setting, optimizer, self._work, self._arguments, factor)
        return final(self._kept.get(setting, make))

    def best_of_adamw(self, adamw: Contender) -> Setting:
        """Sweep both rates of AdamW with one seed until no neighbour is better, and run the best with all seeds."""
        lrs = ADAMW_LRS[: 1 if self._arguments.quick else None]
        best = self.best_of(adamw, [Setting(adamw.name, lr, adamw.scale, self._arguments.seed) for lr in lrs])
        while not self._arguments.quick:
            beside = [replace(best, lr=a * best.lr, scale=b * best.scale) for a, b in NEIGHBOURS]
            found = self.best_of(adamw, [best, *beside])
            if found == best:
                break
            best = found
        self.with_all_seeds(adamw, best)
        return best

    def best_of(self, contender: Contender, settings: Sequence[Setting]) -> Setting:
        """Return the setting with the lowest loss; several are run at a time."""
        with ThreadPoolExecutor(self._arguments.jobs) as pool:
            losses = list(pool.map(lambda s: self.run(contender, s.lr, s.scale, s.seed), settings))
        return settings[losses.index(min(losses))]

    def search(self, contender: Contender, lr: float) -> Setting:
        """Sweep the factor on the matrices' rate with one seed, and run the best one with all of them."""
        first = self._arguments.seed
        if self._arguments.quick:
            self.run(contender, lr, contender.scale, first)
            return Setting(contender.name, lr, contender.scale, first)
        scale = best_on_line(contender.scale, lambda scale: self.run(contender, lr, scale, first), self._arguments.more)
        best = Setting(contender.name, lr, scale, first)
        self.with_all_seeds(contender, best)
        return best

    def with_all_seeds(self, contender: Contender, best: Setting) -> None:
        """Run a setting with every seed."""
        for seed in range(best.seed, best.seed + self._arguments.seeds):
            self.run(contender, best.lr, best.scale, seed)

    def losses(self, setting: Setting) -> dict[int, float]:
        """Return the final losses of a setting by the seeds that were run."""
        same = {s.seed: final(self.found[s]) for s in self.found if replace(s, seed=setting.seed) == setting}
        return dict(sorted(same.items()))


def search_all(table: Table, chosen: Sequence[Contender], jobs: int) -> dict[str, Setting]:
    """Return the best setting of each contender, AdamW's first; several are swept at a time."""
    adamw, *others = chosen
    best = table.best_of_adamw(adamw)
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda contender: table.search(contender, best.lr), others)
        return {adamw.name: best} | {c.name: setting for c, setting in zip(others, found, strict=True)}


def standard_error(values: Sequence[float]) -> float | None:
    """Return that of the mean; None for one value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def adamw_bytes() -> int:
    """Return the bytes of the two fp32 moments that AdamW keeps for the matrices."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**runs.model()))
    _, matrices = matrix_groups(model, {"type": "AdamW", "params": {"lr": 0.0}}, 1.0)
    return sum(2 * 4 * parameter.numel() for parameter in matrices["params"])


def summary(table: Table, won: Mapping[str, Setting], times: Mapping[str, StepTime]) -> Numbers:
    """Return one record per contender, the lowest loss first."""
    rows: Numbers = []
    of_adamw = table.losses(won["AdamW"])
    for name, setting in won.items():
        by_seed, last = table.losses(setting), table.found[setting][-1]
        losses = list(by_seed.values())
        above = [by_seed[seed] - of_adamw[seed] for seed in by_seed if seed in of_adamw]
        beside = [replace(setting, scale=scale) for scale in around(setting.scale)[1:]]
        lost = [final(table.found[s]) - final(table.found[setting]) if s in table.found else None for s in beside]
        state = last.get("lowrank/state_bytes", adamw_bytes())
        rows.append(
            {
                "optimizer": name,
                "loss": mean(losses),
                "standard error": standard_error(losses),
                "above AdamW": mean(above),
                "its standard error": standard_error(above),
                "seeds": ", ".join(f"{loss:.3f}" for loss in losses),
                "lr": setting.lr,
                "scale": setting.scale,
                "half": lost[0],
                "twice": lost[1],
                "state bytes": state,
                "over AdamW's": state / adamw_bytes(),
                "mean rank": last.get("lowrank/mean_rank"),
                "step ms": 1e3 * times[name].seconds,
                "step over AdamW": times[name].over_adamw,
            }
        )
    return sorted(rows, key=lambda row: row["loss"])


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__)
    runs.add_run_options(parser, steps=300)
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders, beside AdamW")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="a picture of the table")
    parser.add_argument("--seeds", type=int, default=3, help="of the best setting and those beside it")
    parser.add_argument("--more", type=int, default=3, help="at most this many values beyond the ends of a sweep")
    parser.add_argument("--repeats", type=int, default=60, help="timed steps of each optimizer")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(steps=10, seeds=1, more=0, repeats=3, eval_sequences=16)
    return arguments


def main() -> None:
    """Measure and report."""
    arguments = parse()
    runs.MODEL = runs.ROOT / f"ds_configs/models/{SIZES[arguments.size]}.json"
    every = contenders(runs.model()["hidden_size"])
    chosen = [c for c in every if arguments.only is None or c.name in ("AdamW", *arguments.only)]
    shared = {key: getattr(arguments, key) for key in ("size", "steps", "batch_size", "sequence_length")}
    with runs.working_folder(arguments.work) as work:
        kept = KeptRuns(arguments.json, shared, Setting, KEPT)
        table = Table(work, arguments, kept)
        won = search_all(table, chosen, arguments.jobs)
        optimizers = {c.name: c.optimizer(won[c.name].lr, won[c.name].scale) for c in chosen}
        sizes = (arguments.batch_size, arguments.sequence_length)
        times = time_in_turns(optimizers, work, sizes, GAP, arguments.repeats, arguments.seed)
    rows = summary(table, won, times)
    print(as_markdown(rows))
    if arguments.json is not None:
        write_json(arguments.json, {**origin(arguments), "shared": shared, "numbers": rows, **kept.as_record()})
    if arguments.plot is not None:
        curves = {
            name: [records for s, records in table.found.items() if replace(s, seed=setting.seed) == setting]
            for name, setting in won.items()
        }
        draw_methods(curves, rows, arguments.plot)


if __name__ == "__main__":
    main()
