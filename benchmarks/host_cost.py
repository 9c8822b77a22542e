"""Host time of an ordinary step: 224 matrices of 16 x 24, so small that almost all of the time is the interpreter's.

pip install galore-torch==1.0
python -m benchmarks.host_cost

The names of the matrices are those of 32 layers of a LLaMA. One process, one thread, fp32 weights, rank 4; no step
refreshes a basis. All optimizers take turns, and each time is a median. *int8 over fp32* is what the state_dtype of the
row costs relative to the same method with moments in fp32.

The second table is of a mixture of experts: 12,288 matrices of 16 x 24, those of 48 layers with 128 experts each, and
GaLore. *bind* makes the optimizer's state, *first step* finds the bases, *step* is the median of ordinary ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

import ds_lowrank
from benchmarks.common import Numbers, interleaved, medians, options, report
from benchmarks.gpu.cases import TINY, is_projected, llama_shapes
from benchmarks.gpu.contenders import OFFICIAL
from benchmarks.ordinary import AS_WEIGHTS, FOREACH, ready, refreshes_of, with_gradients

LAYERS, SHAPE, RANK = 32, (16, 24), 4
EXPERT_LAYERS, EXPERTS = 48, 128
WARM_UP = 3


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every matrix by the name of a projected parameter of a LLaMA."""
    return {name: SHAPE for name in llama_shapes(TINY | {"num_hidden_layers": layers}) if is_projected(name)}


def measure(seed: int, layers: int, repeats: int) -> Numbers:
    """Return one record for each optimizer and dtype of its moments.

    Args:
        seed: Of weights, gradients and sketches.
        layers: Layers of seven matrices.
        repeats: Timed steps of each optimizer.

    Raises:
        RuntimeError: A timed step refreshed a basis.
    """
    parameters = with_gradients(shapes(layers), seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        optimizers = ready(parameters, RANK, seed)
        before = refreshes_of(optimizers)
        steps = {f"{name}, {state_dtype}": each.step for (name, state_dtype), each in optimizers.items()}
        seconds = medians(interleaved(steps, repeats, WARM_UP))
    finally:
        torch.set_num_threads(threads)
    if refreshes_of(optimizers) != before:
        raise RuntimeError("a timed step refreshed a basis: the medians would not be those of ordinary steps")
    taken = dict(zip(optimizers, seconds.values(), strict=True))
    return [
        {
            "optimizer": name,
            "state_dtype": state_dtype,
            "ms": 1e3 * own,
            "us a matrix": 1e6 * own / len(parameters),
            "over AdamW foreach": own / taken[FOREACH, AS_WEIGHTS],
            "over galore-torch": own / taken[OFFICIAL, AS_WEIGHTS],
            "int8 over fp32": own / taken[name, "fp32"] if state_dtype == "int8" else None,
        }
        for (name, state_dtype), own in sorted(taken.items())
    ]


def measure_experts(seed: int, layers: int, repeats: int) -> Numbers:
    """Return the record of a mixture of experts.

    Args:
        seed: Of weights, gradients and sketches.
        layers: Layers of two stacks of experts.
        repeats: Timed ordinary steps.
    """
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.ParameterList()
    for _ in range(2 * layers):
        parameter = torch.nn.Parameter(torch.randn(EXPERTS, *SHAPE, generator=generator))
        parameter.grad = torch.randn(EXPERTS, *SHAPE, generator=generator)
        ds_lowrank.tag_stack(parameter)
        model.append(parameter)
    optimizer = ds_lowrank.GaLore(model, rank=RANK, update_proj_gap=10**9, seed=seed)
    taken = []
    calls: list[Callable[[], object]] = [optimizer.bind, *[optimizer.step] * (1 + repeats)]
    for call in calls:
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return [
        {
            "matrices": 2 * layers * EXPERTS,
            "bind s": taken[0],
            "first step s": taken[1],
            "step ms": 1e3 * median(taken[2:]),
        }
    ]


def main() -> None:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=51, help="timed steps of each optimizer")
    arguments = parser.parse_args()
    layers, repeats = (1, 3) if arguments.quick else (LAYERS, arguments.repeats)
    experts = measure_experts(arguments.seed, 1 if arguments.quick else EXPERT_LAYERS, min(repeats, 9))
    report(measure(arguments.seed, layers, repeats), arguments, experts=experts)


if __name__ == "__main__":
    main()
