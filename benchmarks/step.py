"""Step time of ds_lowrank's GaLore against the official galore-torch, on the matrices of one LLaMA-350M layer.

pip install galore-torch==1.0
python -m benchmarks.step

One process, one thread, fp32; the optimizers have separate weights and the same gradients. An *ordinary* step keeps the
basis. *amortised* is the mean over an interval of 200 steps, one of which refreshes: ours by the randomized range
finder, the official one by a full SVD. *difference* is the relative difference of the first update when both use the
SVD.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch

from benchmarks.common import Numbers, interleaved, medians, options, relative_difference, report
from benchmarks.peers import load_galore_adamw
from ds_lowrank import GaLore
from ds_lowrank.placement.parameter_names import Tag, tag_as

GAP = 200
TARGETS = {32: 0.9, 128: 0.9, 256: 1.0}
HIDDEN, INTERMEDIATE = 1024, 2736
SHAPES = {
    **{f"model.layers.0.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
    "model.layers.0.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
}
LR, SCALE, BETAS = 1e-2, 0.25, (0.9, 0.999)


def layer(seed: int) -> dict[str, torch.nn.Parameter]:
    """Return the seven matrices of a layer, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        name: torch.nn.Parameter(0.02 * torch.randn(*shape, generator=generator)) for name, shape in SHAPES.items()
    }
    for name, parameter in parameters.items():
        tag_as(parameter, Tag(name, "weight"))
        parameter.grad = torch.randn(*parameter.shape, generator=generator)
    return parameters


def ours(parameters: dict[str, torch.nn.Parameter], rank: int, projector: str, eps: float = 1e-8) -> GaLore:
    """Build our GaLore."""
    method = {"rank": rank, "scale": SCALE, "update_proj_gap": GAP, "projector": projector}
    return GaLore([{"params": parameters.values(), **method}], lr=LR, betas=BETAS, eps=eps)


def official(parameters: dict[str, torch.nn.Parameter], rank: int, eps: float = 1e-8) -> torch.optim.Optimizer:
    """Build galore-torch's GaLore."""
    method = {"rank": rank, "scale": SCALE, "update_proj_gap": GAP, "proj_type": "std"}
    groups = [{"params": list(parameters.values()), **method}]
    return load_galore_adamw()(groups, lr=LR, betas=BETAS, eps=eps, no_deprecation_warning=True)


def first_update_difference(seed: int, rank: int) -> float:
    """Return the largest relative difference of any matrix's first update, both optimizers using the exact SVD."""
    # Adam's first direction is the sign of the projection, except for epsilon: if that were tiny, elements that are
    # zero up to rounding could have either sign. The official optimizer adds it before correcting the root's bias.
    eps = 1e-2
    start, a, b = layer(seed), layer(seed), layer(seed)
    ours(a, rank, "svd", eps).step()
    official(b, rank, eps * math.sqrt(1 - BETAS[1])).step()
    return max(
        relative_difference(a[name].detach() - start[name].detach(), b[name].detach() - start[name].detach())
        for name in SHAPES
    )


def compare(seed: int, rank: int, repeats: int, refreshes: int) -> dict[str, object]:
    """Return the record of one rank: step times, their ratios (ours over the official one) and the target."""
    optimizers = {"ours": ours(layer(seed), rank, "randomized"), "official": official(layer(seed), rank)}
    refresh = medians(
        interleaved({name: partial(_step_at, o, GAP) for name, o in optimizers.items()}, refreshes, warm_up=0)
    )
    ordinary = medians(
        interleaved({name: partial(_step_at, o, 1) for name, o in optimizers.items()}, repeats, warm_up=3)
    )
    amortised = {name: ((GAP - 1) * ordinary[name] + refresh[name]) / GAP for name in optimizers}
    return {
        "rank": rank,
        "ours ms": 1e3 * ordinary["ours"],
        "official ms": 1e3 * ordinary["official"],
        "ratio": ordinary["ours"] / ordinary["official"],
        "target": TARGETS[rank],
        "refresh ms": 1e3 * refresh["ours"],
        "official refresh ms": 1e3 * refresh["official"],
        "amortised ratio": amortised["ours"] / amortised["official"],
        "difference": first_update_difference(seed, rank),
    }


def _step_at(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Take a step as if ``step`` steps had been taken; it refreshes if that is a multiple of the interval."""
    for state in optimizer.state.values():
        state["step"] = step
    optimizer.step()


def measure(seed: int, repeats: int, refreshes: int, ranks: Iterable[int]) -> Numbers:
    """Return one record per rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [compare(seed, rank, repeats, refreshes) for rank in ranks]
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=51, help="ordinary steps of each optimizer")
    parser.add_argument(
        "--refreshes", type=int, default=3, help="refresh steps of each optimizer; the official ones take long"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        rows = measure(arguments.seed, repeats=5, refreshes=1, ranks=list(TARGETS)[:1])
    else:
        rows = measure(arguments.seed, arguments.repeats, arguments.refreshes, TARGETS)
    report(rows, arguments)
    worst = max(row["difference"] for row in rows)
    if worst > 1e-4:
        raise SystemExit(
            f"\nThe first updates differ by {worst:.2g} (relative): the optimizers do not do the same work."
        )


if __name__ == "__main__":
    main()
