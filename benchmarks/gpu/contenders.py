"""Optimizers that take turns on the same parameters: this package's methods, torch's AdamW and galore-torch."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from statistics import median
from typing import Any

import torch

import ds_lowrank
from benchmarks.gpu.budget import interrupted_after
from benchmarks.gpu.cases import Cell, is_projected, method_options, tagged
from benchmarks.peers import load_galore_adamw
from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.optimizer import LowRankOptimizer
from ds_lowrank.optimizer.registry import OPTIMIZERS

ADAMW, OFFICIAL = "AdamW (torch, fused)", "galore-torch"
GAP, LR = 4, 1e-5
"""The interval of the timed optimizers, so that few steps include refreshes. Times do not depend on the rate: it is
small because all optimizers step the same weights."""
NEVER = 10**9
Parameters = Mapping[str, torch.nn.Parameter]
Forward = Callable[[], torch.Tensor]


class Stopwatch:
    """Seconds between marks: by CUDA events on a card, which do not make it wait, and by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda, self._marks = device.type == "cuda", list[Any]()
        self._wait()

    def _wait(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()

    def mark(self) -> None:
        """End one interval and begin the next."""
        if not self._is_cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Return the length of each interval, after waiting for the device."""
        self._wait()
        pairs = list(zip(self._marks[:-1], self._marks[1:], strict=True))
        return [a.elapsed_time(b) / 1e3 for a, b in pairs] if self._is_cuda else [b - a for a, b in pairs]


@dataclass(frozen=True)
class Sample:
    """One measured step.

    Attributes:
        refreshed: Whether the step found new bases.
        seconds: The length of each interval: the step alone, or forward and backward followed by the step.
        transient: Peak bytes that the step allocated in addition to what was allocated before it; None on a CPU.
    """

    refreshed: bool
    seconds: list[float]
    transient: int | None


@dataclass
class Contender:
    """One optimizer and what was measured of it.

    Attributes:
        name: The label in the tables.
        build: A function that makes the optimizer.
        turn: A function that takes one step and marks its beginning, the ends of its intervals and its end.
        device: The device of the parameters.
        state_bytes: Bytes that building the optimizer and its first step have left allocated; None on a CPU.
        samples: The measured steps.
        error: Why the contender was dropped; empty if it was not.
        optimizer: The optimizer; None before it is built and after it is released.
    """

    name: str
    build: Callable[[], torch.optim.Optimizer]
    turn: Callable[[torch.optim.Optimizer, Stopwatch], None]
    device: torch.device
    samples: list[Sample] = field(default_factory=list)
    state_bytes: int | None = None
    error: str = ""
    optimizer: torch.optim.Optimizer | None = None

    def prepare(self, seconds: float) -> None:
        """Build the optimizer and take a first step, which is not measured."""

        def first() -> None:
            before = allocated(self.device)
            self.optimizer = self.build()
            self.turn(self.optimizer, Stopwatch(self.device))
            after = allocated(self.device)
            self.state_bytes = None if after is None or before is None else after - before

        self._attempt(first, seconds)

    def take_turn(self, seconds: float) -> None:
        """Measure one step, unless the contender was dropped."""
        if self.optimizer is not None:
            self._attempt(self._measure, seconds)

    def _measure(self) -> None:
        assert self.optimizer is not None
        count, before = refreshes(self.optimizer), allocated(self.device)
        if before is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
        watch = Stopwatch(self.device)
        self.turn(self.optimizer, watch)
        taken = watch.seconds()
        transient = None if before is None else torch.cuda.max_memory_allocated(self.device) - before
        self.samples.append(Sample(refreshes(self.optimizer) > count, taken, transient))

    def _attempt(self, call: Callable[[], None], seconds: float) -> None:
        """Call a function; an exception drops this contender and no other."""
        try:
            with interrupted_after(seconds):
                call()
        except Exception as error:  # out of memory, a missing kernel, time used up
            self.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if self.error:
            self.release()

    def release(self) -> None:
        """Free what the optimizer has allocated."""
        self.optimizer = None
        free_memory(self.device)

    def median_seconds(self, refreshed: bool, interval: int | None = None) -> float | None:
        """Return the median over steps of one kind, of a whole step or one interval; None without such a step."""
        chosen = [sample.seconds for sample in self.samples if sample.refreshed == refreshed]
        return median(sum(each) if interval is None else each[interval] for each in chosen) if chosen else None

    @property
    def transient_bytes(self) -> int | None:
        """The most that any measured step allocated beyond what was allocated before it."""
        found = [sample.transient for sample in self.samples if sample.transient is not None]
        return max(found, default=None)


def allocated(device: torch.device) -> int | None:
    """Return the bytes of live tensors on a card; None for a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def free_memory(device: torch.device) -> None:
    """Return the memory of unreachable tensors to a card; nothing to do on a CPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def load_libraries(device: torch.device) -> None:
    """Multiply and factor once, so that the libraries' workspaces are not counted as some optimizer's state."""
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.eye(64, dtype=dtype, device=device)
        torch.linalg.qr((square @ square).float())


def refreshes(optimizer: torch.optim.Optimizer) -> float:
    """Return how many bases the optimizer has found so far; 0 for the optimizers of other packages."""
    return float(optimizer.metrics()["lowrank/refreshes"]) if isinstance(optimizer, LowRankOptimizer) else 0.0


def step_only(optimizer: torch.optim.Optimizer, watch: Stopwatch) -> None:
    """Take one optimizer step on the gradients that are there."""
    watch.mark()
    optimizer.step()
    watch.mark()


def whole_step(forward: Forward) -> Callable[[torch.optim.Optimizer, Stopwatch], None]:
    """Return a turn that runs forward and backward, with the probes of methods that have any, and then the step."""

    def turn(optimizer: torch.optim.Optimizer, watch: Stopwatch) -> None:
        try:
            watch.mark()
            if isinstance(optimizer, LowRankOptimizer):
                ds_lowrank.forward_backward(optimizer, forward)
            else:
                forward().backward()  # type: ignore[no-untyped-call]
            watch.mark()
            optimizer.step()
            watch.mark()
        finally:
            optimizer.zero_grad()  # the next optimizer must not find the gradients of one that failed

    return turn


def builders(cell: Cell, parameters: Parameters, seed: int, **more: Any) -> dict[str, Callable[[], Any]]:
    """Return a function for every optimizer of a cell that builds it.

    Args:
        cell: The rank and the dtype of the moments; the peers have moments in the dtype of the weights.
        parameters: The parameters of the model by name. All optimizers step the same ones.
        seed: Seed of the sketches.
        more: Further options of the methods.
    """

    def ours(method: str) -> Callable[[], torch.optim.Optimizer]:
        more["matmul_precision"] = cell.precision
        options = method_options(method, cell.rank, GAP, state_dtype=cell.state_dtype, seed=seed, **more)
        return lambda: OPTIMIZERS[method](tagged(parameters), lr=LR, **options)

    return {
        ADAMW: lambda: torch.optim.AdamW(list(parameters.values()), lr=LR, fused=True),
        **{method: ours(method) for method in METHODS},
        OFFICIAL: lambda: official(parameters, cell.rank),
    }


def official(parameters: Parameters, rank: int) -> torch.optim.Optimizer:
    """Build ``galore_torch.GaLoreAdamW`` with random orthonormal bases, so that no step has to find any.

    Its full SVD of every matrix would take minutes. An ordinary step costs the same with any basis.
    """
    matrices = {name: parameter for name, parameter in parameters.items() if is_projected(name)}
    rest = [parameter for name, parameter in parameters.items() if not is_projected(name)]
    own = {"rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": list(matrices.values()), **own}]
    optimizer = load_galore_adamw()(groups, lr=LR, no_deprecation_warning=True)
    for parameter in matrices.values():
        projector = _official_projector(rank)
        m, n = parameter.shape
        basis, _ = torch.linalg.qr(torch.randn(min(m, n), min(rank, m, n), device=parameter.device))
        projector.ortho_matrix = (basis.T if m >= n else basis).to(parameter.dtype)
        optimizer.state[parameter] |= {"step": 1, "projector": projector}
    return optimizer


def official_refresh(matrices: list[torch.Tensor], rank: int) -> None:
    """Find the basis of every matrix as galore-torch does: by a full SVD."""
    projector = _official_projector(rank)
    for matrix in matrices:
        projector.get_orthogonal_matrix(matrix, rank, type="right" if matrix.shape[0] >= matrix.shape[1] else "left")


def _official_projector(rank: int) -> Any:
    return import_module("galore_torch.galore_projector").GaLoreProjector(rank, update_proj_gap=NEVER, scale=0.25)
