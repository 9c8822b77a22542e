"""What optimizer offload costs on the host: time of the step on a CPU for each element of the weights.

python -m benchmarks.offload

The matrices are those of one layer of a LLaMA-350M: four of 1024 x 1024, three of 1024 x 2736. One process, one thread,
fp32 weights and gradients as with offload; no step refreshes a basis. All optimizers take turns, and each time is a
median of the thread's own CPU time, which other work on the machine disturbs less than the clock. *clearing* is what an
engine with offload does beside the step: it zeroes the gradients.

The second table is arithmetic, from DeepSpeed 0.19.8's code: the bytes that a step copies between host and card, for
each element that this rank steps, with a bf16 model and M micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.common import Numbers, medians, options, report
from benchmarks.gpu.cases import TINY, is_projected, llama_shapes
from benchmarks.gpu.contenders import ADAMW
from benchmarks.ordinary import AS_WEIGHTS, ready, refreshes_of, with_gradients
from ds_lowrank.methods import METHODS

LLAMA_350M = TINY | {"hidden_size": 1024, "intermediate_size": 2736, "num_hidden_layers": 1}
RANKS = (64, 256)
CLEARING = "clearing"
WARM_UP = 2


def cpu_seconds(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time calls in turns, A B A B ..., in seconds of this thread on the CPU.

    Args:
        calls: By name; on one thread.
        repeats: Measured calls of each, after some that are not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-WARM_UP, repeats):
        for name, call in calls.items():
            started = time.thread_time()
            call()
            if repeat >= 0:
                seconds[name].append(time.thread_time() - started)
    return seconds


def measure(sizes: dict[str, int], rank: int, seed: int, repeats: int) -> Numbers:
    """Return one record for each optimizer and dtype of its moments.

    Args:
        sizes: Of a LLaMA.
        rank: Of the bases.
        seed: Of weights, gradients and sketches.
        repeats: Timed steps of each optimizer.

    Raises:
        RuntimeError: A timed step refreshed a basis.
    """
    shapes = {name: shape for name, shape in llama_shapes(sizes).items() if is_projected(name)}
    parameters = with_gradients(shapes, seed)
    elements = sum(parameter.numel() for parameter in parameters.values())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = ready(parameters, rank, seed)
        found = {key: each for key, each in found.items() if key[0] in {*METHODS, ADAMW}}
        before = refreshes_of(found)
        cleared = [torch.zeros_like(parameter) for parameter in parameters.values()]
        steps = {key: each.step for key, each in found.items()}
        calls: dict[str, Callable[[], object]] = {"; ".join(key): call for key, call in steps.items()}
        calls[CLEARING] = lambda: [gradient.zero_() for gradient in cleared]
        seconds = medians(cpu_seconds(calls, repeats))
    finally:
        torch.set_num_threads(threads)
    if refreshes_of(found) != before:
        raise RuntimeError("a timed step refreshed a basis: the medians would not be those of ordinary steps")
    rows = [(*key, seconds["; ".join(key)]) for key in sorted(found)] + [(CLEARING, "", seconds[CLEARING])]
    adamw = seconds[f"{ADAMW}; {AS_WEIGHTS}"]
    return [
        {
            "optimizer": name,
            "state_dtype": "" if state_dtype == AS_WEIGHTS else state_dtype,
            "rank": rank,
            "ns an element": 1e9 * own / elements,
            "over AdamW": own / adamw,
        }
        for name, state_dtype, own in rows
    ]


def copied_bytes(stage: int, accumulates_in_fp32: bool) -> tuple[str, str]:
    """Return the bytes of an element that a step copies to the host, and to the card, as formulas in M micro-batches.

    The gradient goes to the host in fp32 once, the new weight to the card in bf16. Where the sum of the micro-batches
    lies on the host, each micro-batch fetches it, adds to it on the card, and puts it back; the first one only puts it,
    and at ZeRO 3 fetches it once more.

    Args:
        stage: ZeRO's, 1 to 3.
        accumulates_in_fp32: ``data_types.grad_accum_dtype`` ``fp32``.
    """
    if stage == 1 or (stage == 2 and accumulates_in_fp32):  # the sum is on the card
        return "4", "2"
    if stage == 2:
        return "4; if M > 1: 4 + 2 M", "2; if M > 1: 2 M"
    size = 4 if accumulates_in_fp32 else 2
    return f"4 + {size} M", f"2 + {size} M"


def copies() -> Numbers:
    """Return one record for each stage and dtype of accumulation."""
    rows: Numbers = []
    for stage in (1, 2, 3):
        for in_fp32 in (False, True):
            to_host, to_card = copied_bytes(stage, in_fp32)
            dtype = "fp32" if in_fp32 else "bf16"
            rows.append({"ZeRO": stage, "accumulation": dtype, "to the host": to_host, "to the card": to_card})
    return rows


def main() -> None:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each optimizer")
    arguments = parser.parse_args()
    sizes, ranks = (TINY, (4,)) if arguments.quick else (LLAMA_350M, RANKS)
    repeats = 3 if arguments.quick else arguments.repeats
    rows = [row for rank in ranks for row in measure(sizes, rank, arguments.seed, repeats)]
    report(rows, arguments, copies=copies())


if __name__ == "__main__":
    main()
