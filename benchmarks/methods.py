"""Every method against AdamW: validation loss after the same tokens, bytes of state, time of a step.

python -m benchmarks.methods

Every run is launch/pretrain.py on one rank and one core, two runs at a time, on the standard library's source. Each
contender is swept over three learning rates; at the best of them, over three factors on the learning rate of the
matrices (a method's ``scale``; for AdamW and VLoRP, a separate learning rate); and at the best of those over three
learning rates again. A sweep whose best value is at its edge continues beyond it. Every setting is run with all seeds
and judged by the mean.

*state bytes* covers the projected matrices at the end, *bases* is the number of bases or projections that a matrix has
had by then. *step* is a whole training step, timed in turns in one process and amortised over a refresh interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import runs
from benchmarks.common import Numbers, options, report
from benchmarks.method_times import time_in_turns
from benchmarks.plots import draw_methods
from benchmarks.runs import Found, Records, Setting, at_edge, best, final, over_seeds
from ds_lowrank.methods import METHODS
from ds_lowrank.training.param_groups import matrix_groups

GAP = 50
RANK = runs.model()["hidden_size"] // 4


@dataclass(frozen=True)
class Contender:
    """An optimizer, its options, and what is swept.

    Attributes:
        name: The label in the table.
        type: DeepSpeed's ``optimizer.type``.
        params: DeepSpeed's ``optimizer.params``, without ``lr`` and ``scale``.
        lrs: Learning rates, swept at the first of ``scales``, and around the best one again if another scale is better.
        scales: Factors on the learning rate of the matrices, swept at the best learning rate.
    """

    name: str
    type: str
    params: Mapping[str, Any]
    lrs: tuple[float, ...]
    scales: tuple[float, ...]

    @property
    def has_scale(self) -> bool:
        """Whether ``scale`` is an option of the method; otherwise the matrices get a learning rate of their own."""
        return self.type in METHODS and METHODS[self.type].Options.rate_key in METHODS[self.type].Options.model_fields

    def optimizer(self, lr: float, scale: float) -> dict[str, Any]:
        """Return DeepSpeed's ``optimizer`` entry."""
        own = {"scale": scale} if self.has_scale else {}
        return {"type": self.type, "params": {**self.params, "lr": lr, **own}}


ADAM_SCALES = (1 / 16, 1 / 32, 1 / 8)
GALORE_SCALES = (0.25, 0.125, 0.5)
CONTENDERS: tuple[Contender, ...] = (
    Contender("AdamW", "AdamW", {"torch_adam": True}, (1e-2, 2e-2, 4e-2), ADAM_SCALES),
    Contender("GaLore", "GaLore", {"rank": RANK, "update_proj_gap": GAP}, (5e-3, 1e-2, 2e-2), GALORE_SCALES),
    Contender("OnlineSubspaceDescent", "OnlineSubspaceDescent", {"rank": RANK}, (5e-3, 1e-2, 2e-2), GALORE_SCALES),
    Contender(
        "VLoRP", "VLoRP", {"rank": 4, "granularity": 8, "update_proj_gap": GAP}, (1e-2, 2e-2, 4e-2), ADAM_SCALES,
    ),
    Contender(
        "AdaRankGrad", "AdaRankGrad", {"rank_max": RANK, "residual_tol": 0.2, "update_proj_gap": GAP},
        (5e-3, 1e-2, 2e-2), GALORE_SCALES,
    ),
    Contender("Apollo", "Apollo", {"rank": RANK, "update_proj_gap": GAP}, (5e-3, 1e-2, 2e-2), (0.25, 0.5, 1.0)),
    Contender(
        "Apollo-Mini", "Apollo", {"mini": True, "update_proj_gap": GAP},
        (5e-3, 1e-2, 2e-2), (sqrt(2), sqrt(8), sqrt(128)),
    ),
)  # fmt: skip
"""Ranks are a quarter of the hidden size; VLoRP stores as many elements per row, 8 x 4. The scales of the papers (0.25;
1 for Apollo and sqrt(128) for Apollo-Mini) are among those that are swept."""


def best_on_line(values: Sequence[float], loss: Callable[[float], float], more: int) -> float:
    """Return the value with the lowest loss; while that is at the edge, try up to ``more`` values beyond it."""
    losses = {value: loss(value) for value in values}
    while True:
        tried = sorted(losses)
        winner = min(tried, key=lambda value: losses[value])
        if more == 0 or len(tried) == 1 or winner not in (tried[0], tried[-1]):
            return winner
        neighbour = tried[1] if winner == tried[0] else tried[-2]
        beyond = winner * winner / neighbour
        losses[beyond] = loss(beyond)
        more -= 1


def search(contender: Contender, run: Callable[[Setting], Records], seeds: Sequence[int], more: int) -> Found:
    """Sweep one contender and return the records of all its runs."""
    found: Found = {}

    def loss(lr: float, scale: float) -> float:
        settings = [Setting(contender.name, lr, scale, seed) for seed in seeds]
        found.update((setting, run(setting)) for setting in settings if setting not in found)
        return mean(final(found[setting]) for setting in settings)

    lr = best_on_line(contender.lrs, lambda lr: loss(lr, contender.scales[0]), more)
    scale = best_on_line(contender.scales, lambda scale: loss(lr, scale), more)
    if scale != contender.scales[0]:
        best_on_line((lr / 2, lr, 2 * lr), lambda lr: loss(lr, scale), more)
    return found


def search_all(contenders: Sequence[Contender], work: Path, arguments: argparse.Namespace) -> Found:
    """Sweep all contenders, several at a time, and return the records of all runs."""
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)

    def run(contender: Contender) -> Callable[[Setting], Records]:
        return lambda s: runs.train(
            s, contender.optimizer(s.lr, s.scale), work, arguments, None if contender.has_scale else s.scale
        )

    # The first run caches the tokenizer and the tokens for all others.
    first = contenders[0]
    run(first)(Setting(first.name, first.lrs[0], first.scales[0], arguments.seed))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        parts = pool.map(lambda c: search(c, run(c), seeds, arguments.more), contenders)
        return {setting: records for part in parts for setting, records in part.items()}


def times(contenders: Sequence[Contender], work: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the amortised seconds of a whole training step with each contender."""
    optimizers = {c.name: c.optimizer(c.lrs[0], c.scales[0]) for c in contenders}
    sizes = (arguments.batch_size, arguments.sequence_length)
    return time_in_turns(optimizers, work, sizes, GAP, arguments.repeats, arguments.seed)


def adamw_bytes() -> int:
    """Return the bytes of the two fp32 moments that AdamW keeps for the matrices."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**runs.model()))
    _, matrices = matrix_groups(model, {"type": "AdamW", "params": {"lr": 0.0}}, 1.0)
    return sum(2 * 4 * parameter.numel() for parameter in matrices["params"])


def losses(found: Found, setting: Setting) -> dict[str, Any]:
    """Return the columns that the tables of this benchmark share."""
    each = over_seeds(found, setting)
    return {
        "optimizer": setting.optimizer,
        "lr": setting.lr,
        "scale of the matrices": setting.scale,
        "validation loss": mean(each),
        "seeds": ", ".join(f"{loss:.3f}" for loss in each),
    }


def summary(found: Found, seconds: Mapping[str, float]) -> Numbers:
    """Return one record per contender, at its best setting."""
    rows: Numbers = []
    for name, setting in best(found).items():
        last = found[setting][-1]
        matrices = last.get("lowrank/projected_matrices")
        rows.append(
            {
                **losses(found, setting),
                "state bytes": last.get("lowrank/state_bytes", adamw_bytes()),
                "mean rank": last.get("lowrank/mean_rank"),
                "bases": last["lowrank/refreshes"] / matrices if matrices else None,
                "step ms": 1e3 * seconds[name],
                "step over AdamW": seconds[name] / seconds["AdamW"],
            }
        )
    return rows


def grid(found: Found, seed: int) -> Numbers:
    """Return one record per setting that was run."""
    winners = best(found).values()
    return [
        {**losses(found, setting), "best": "yes" if setting in winners else ""}
        for setting in found
        if setting.seed == seed
    ]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__)
    runs.add_run_options(parser, steps=300)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="default: docs/images/methods.png; none if --quick")
    parser.add_argument("--seeds", type=int, default=2, help="per setting")
    parser.add_argument("--more", type=int, default=2, help="at most this many values beyond the edge of a sweep")
    parser.add_argument("--repeats", type=int, default=60, help="timed steps of each optimizer")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(steps=10, seeds=1, more=0, repeats=3, eval_sequences=16)
    elif arguments.plot is None:
        arguments.plot = runs.ROOT / "docs/images/methods.png"
    return arguments


def main() -> None:
    """Measure and report."""
    arguments = parse()
    contenders = CONTENDERS
    if arguments.quick:
        contenders = tuple(replace(c, lrs=c.lrs[:1], scales=c.scales[:1]) for c in contenders)
    with runs.working_folder(arguments.work) as work:
        found = search_all(contenders, work, arguments)
        rows = summary(found, times(contenders, work, arguments))
    tried = grid(found, arguments.seed)
    report(rows, arguments, grid=tried)
    print(*at_edge(tried), sep="\n")
    curves = {
        name: [records for s, records in found.items() if replace(s, seed=setting.seed) == setting]
        for name, setting in best(found).items()
    }
    if arguments.plot is not None:
        draw_methods(curves, rows, arguments.plot)


if __name__ == "__main__":
    main()
