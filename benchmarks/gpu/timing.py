"""Times and memory of optimizer steps and of whole training steps, the optimizers of a cell in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.common import Numbers
from benchmarks.gpu.budget import GRACE, Budget, interrupted_after
from benchmarks.gpu.cases import Cell, bytes_drawn, is_projected, llama_shapes, model_config, parameter_count
from benchmarks.gpu.contenders import (
    ADAMW,
    OFFICIAL,
    Contender,
    Parameters,
    Stopwatch,
    allocated,
    builders,
    free_memory,
    load_libraries,
    official_refresh,
    step_only,
    whole_step,
)

ROUNDS, QUICK_ROUNDS = 12, 5
"""Measured steps of each optimizer: with an interval of 4, nine ordinary ones and three that refresh; quick, four and
one."""
MIB = 2**20


@dataclass
class Section:
    """One section of the report.

    Attributes:
        name: As its share of the budget is called.
        budget: The time limits of all sections.
        device: The device to measure on.
        seed: Seed of the weights, gradients and sketches.
        quick: Whether to take few steps.
        rows: One record per cell and optimizer that was measured or failed.
        skipped: What was not measured, and why.
        bytes_per_second: What a copy on the card reads and writes, once it has been measured.
    """

    name: str
    budget: Budget
    device: torch.device
    seed: int
    quick: bool
    rows: Numbers = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    bytes_per_second: float | None = None

    @property
    def left(self) -> float:
        """Seconds until the section has to end."""
        return self.budget.left(self.name)

    def skip(self, what: object, why: str) -> None:
        """Note that something was not measured."""
        self.skipped.append({"section": self.name, "what": str(what), "why": why})


@dataclass
class Prepared:
    """What the optimizers of a cell step.

    Attributes:
        parameters: The parameters by name.
        turn: A function that takes one step with an optimizer.
        gradients: The gradients of the projected matrices by name; empty if every step computes its own.
        options: Further options of the methods.
    """

    parameters: Parameters
    turn: Callable[[torch.optim.Optimizer, Stopwatch], None]
    gradients: dict[str, torch.Tensor]
    options: dict[str, Any]


def time_cells(section: Section, cells: Iterable[Cell], prepare: Callable[[Section, Cell], Prepared]) -> None:
    """Measure cells in their order until the section's time is used up."""
    for cell in cells:
        if section.left <= 0:
            section.skip(cell, "the section's time was used up")
            continue
        try:
            _time_cell(section, cell, prepare)
        except Exception as error:  # no memory for the model, no transformers, a device that no longer answers
            section.skip(cell, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _time_cell(section: Section, cell: Cell, prepare: Callable[[Section, Cell], Prepared]) -> None:
    """Add the rows of one cell."""
    free_memory(section.device)
    with interrupted_after(section.left + GRACE):
        prepared = prepare(section, cell)
    load_libraries(section.device)
    base = allocated(section.device)
    built = builders(cell, prepared.parameters, section.seed, **prepared.options)
    contenders = [Contender(name, build, prepared.turn, section.device) for name, build in built.items()]
    for contender in contenders:
        if section.left > 0:
            contender.prepare(section.left + GRACE)
    rounds = QUICK_ROUNDS if section.quick else ROUNDS
    for done in range(rounds):
        if section.left <= 0:
            section.skip(f"{cell}: steps {done + 1} to {rounds} of each optimizer", "the section's time was used up")
            break
        for contender in contenders:
            contender.take_turn(section.left + GRACE)
    dense = next(contender for contender in contenders if contender.name == ADAMW).median_seconds(refreshed=False)
    for contender in contenders:
        if not contender.samples and not contender.error:
            section.skip(f"{cell}: {contender.name}", "the section's time was used up")
            continue
        if contender.error:
            section.skip(f"{cell}: {contender.name}", contender.error)
        row = _row(cell, contender, dense, base)
        row["floor ms"] = _floor_ms(section, cell, contender.name)
        section.rows.append(row)
        contender.release()
        if contender.name == OFFICIAL and contender.samples and prepared.gradients:
            row["refresh ms"] = _official_refresh_ms(section, cell, prepared.gradients)


def _row(cell: Cell, contender: Contender, dense: float | None, base: int | None) -> dict[str, Any]:
    """Return the record of one optimizer in one cell.

    Args:
        cell: The cell.
        contender: The optimizer after its turns.
        dense: AdamW's seconds per step.
        base: Bytes that were allocated before any optimizer was built: weights, and gradients that persist.
    """
    ordinary, refresh = (contender.median_seconds(refreshed) for refreshed in (False, True))
    state, transient = contender.state_bytes, contender.transient_bytes
    alone = None if None in (base, state, transient) else (base or 0) + (state or 0) + (transient or 0)
    is_peer = contender.name in (ADAMW, OFFICIAL)
    row = {
        "model": cell.model,
        "rank": None if contender.name == ADAMW else cell.rank,
        "state_dtype": "as weights" if is_peer else cell.state_dtype,
        "products": None if is_peer else cell.precision,
        "optimizer": contender.name,
        "ordinary ms": _scaled(ordinary, 1e3),
        "refresh ms": _scaled(refresh, 1e3),
        "over AdamW": ordinary / dense if ordinary and dense else None,
        "state MiB": _scaled(state, 1 / MIB),
        "transient MiB": _scaled(transient, 1 / MIB),
        "peak MiB": _scaled(alone, 1 / MIB),
        "ordinary steps": sum(not sample.refreshed for sample in contender.samples),
        "refresh steps": sum(sample.refreshed for sample in contender.samples),
        "error": contender.error,
    }
    if contender.samples and len(contender.samples[0].seconds) > 1:
        row["step ms"] = _scaled(contender.median_seconds(False, interval=1), 1e3)
    return row


def _floor_ms(section: Section, cell: Cell, name: str) -> float | None:
    """Return what the bytes that a step of an optimizer must read and write take on this card; None on a CPU."""
    if section.device.type != "cuda":
        return None
    if section.bytes_per_second is None:
        one, other = (torch.zeros(2**28, dtype=torch.float32, device=section.device) for _ in range(2))
        watch = Stopwatch(section.device)
        for _ in range(6):
            other.copy_(one)
            watch.mark()
        section.bytes_per_second = 2 * one.nbytes / min(watch.seconds())
    return 1e3 * bytes_drawn(llama_shapes(model_config(cell.model)), name == ADAMW) / section.bytes_per_second


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _official_refresh_ms(section: Section, cell: Cell, gradients: dict[str, torch.Tensor]) -> float | None:
    """Return what galore-torch's bases of all matrices take, if one layer's show that there is time for it."""
    layers = model_config(cell.model)["num_hidden_layers"]
    first = [gradient for name, gradient in gradients.items() if name.startswith("model.layers.0.")]
    what = f"{cell}: {OFFICIAL}, refresh"
    if section.left <= 0:
        section.skip(what, "the section's time was used up")
        return None
    try:
        with interrupted_after(section.left + GRACE):
            official_refresh(first[:1], cell.rank)  # the first SVD also loads the library
            one = _timed(section.device, first, cell.rank)
            if one * layers > 0.5 * section.left:
                needs = f"the SVDs of one layer take {one:.2f} s and those of {layers} would take about"
                section.skip(what, f"{needs} {one * layers:.0f} s; the section has {max(section.left, 0):.0f} s left")
                return None
            return 1e3 * _timed(section.device, list(gradients.values()), cell.rank)
    except Exception as error:
        section.skip(what, f"{type(error).__name__}: {' '.join(str(error).split())}")
        return None


def _timed(device: torch.device, matrices: list[torch.Tensor], rank: int) -> float:
    watch = Stopwatch(device)
    watch.mark()
    official_refresh(matrices, rank)
    watch.mark()
    return watch.seconds()[0]


def prepare_step(section: Section, cell: Cell) -> Prepared:
    """Make weights and random gradients in fp32 with a LLaMA's shapes; without a loss, no method probes."""
    generator = torch.Generator(section.device).manual_seed(section.seed)
    parameters = {}
    for name, shape in llama_shapes(model_config(cell.model)).items():
        drawn = 0.02 * torch.randn(shape, generator=generator, device=section.device)
        parameters[name] = torch.nn.Parameter(drawn)
        parameters[name].grad = torch.randn(shape, generator=generator, device=section.device)
    gradients = {name: p.grad for name, p in parameters.items() if is_projected(name) and p.grad is not None}
    return Prepared(parameters, step_only, gradients, {"perturbation_radius": 0.0})


def prepare_whole(section: Section, cell: Cell) -> Prepared:
    """Make a LLaMA in bf16 and one batch of random tokens.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(section.seed)
    config = model_config(cell.model)
    with torch.device(section.device):
        model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
        shape = (2, 16) if cell.model == "tiny" else (8, 512)
        tokens = torch.randint(config["vocab_size"], shape)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != (known := parameter_count(llama_shapes(config))):
        raise ValueError(f"transformers builds {count} parameters and the shapes here have {known}")

    def forward() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss

    return Prepared(dict(model.named_parameters()), whole_step(forward), {}, {})
