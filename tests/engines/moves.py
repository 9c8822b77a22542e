"""A checkpoint of real engines moved between two grids: what each rank does, and what must be equal afterwards."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.engines import grids
from tests.engines.grids import Grid
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, config

SAVED_AFTER, STEPS = 3, 13
GRIDS = [
    *(Grid(data, 1, 1, stage) for stage in range(4) for data in (1, 2, 3, 4)),
    *(Grid(data, 2, 1, stage) for stage in range(4) for data in (1, 2)),
    *(Grid(2, 2, 1, stage, "autotp") for stage in range(4)),
    *(Grid(data, tensor, 2, stage) for stage in (0, 1) for data, tensor in ((1, 1), (2, 1), (1, 2))),
    Grid(2, 2, 2, 1),
    Grid(8, 1, 1, 2),
    Grid(8, 1, 1, 3),
]
ALONE = Grid(1, 1, 1, 0)
STATE_DTYPES = ("fp32", "bf16", "int8")
PROJECTING = ("AdaRankGrad", "GaLore", "GradNormLoRP", "Lorenza", "VLoRP")
"""Methods whose engines' options here allow projected reduction."""

IN_8_BITS = {"LDAdam": {"error_feedback": False}}
"""A number for every element is rounded anew where another grid cuts it into other blocks."""


@dataclass(frozen=True)
class Place:
    """Where a run is.

    Attributes:
        grid: of its ranks.
        state_dtype: of its moments.
        projected: whether it has projected reduction, at ZeRO 0 only.
    """

    grid: Grid
    state_dtype: str = "fp32"
    projected: bool = False

    def __str__(self) -> str:
        return f"{self.grid}-{self.state_dtype}{'-projected' if self.projected else ''}"


@dataclass(frozen=True)
class Move:
    """A run that is saved in one place and loaded in another.

    Attributes:
        source: where it is saved.
        target: where it is loaded.
        method: what steps the matrices.
        precision: of the weights: ``fp32``, ``bf16`` with fp32 masters, or ``bf16 alone``.
        tied: whether the head is the embedding.
    """

    source: Place
    target: Place
    method: str
    precision: str = "fp32"
    tied: bool = False

    def __str__(self) -> str:
        tied = "-tied" if self.tied else ""
        return f"{self.method}-{self.precision.replace(' ', '-')}{tied}: {self.source} to {self.target}"


def fits(place: Place, method: str, precision: str) -> bool:
    """Whether there are such runs: the README's table says why not."""
    if place.projected and (place.grid.stage or method not in PROJECTING or precision == "bf16"):
        return False
    return not (precision == "bf16" and place.grid.stage == 0 and place.grid.tensor > 1)


def drawn(count: int, seed: int, fp32: bool = False) -> list[Move]:
    """Random moves, the methods in turns.

    Args:
        count: how many.
        seed: of the draws.
        fp32: whether weights and moments are fp32, so that curves can be compared.
    """
    draw, names, found = random.Random(seed), sorted(METHODS), []
    while len(found) < count:
        method = names[len(found) % len(names)]
        precision = "fp32" if fp32 else draw.choice(("fp32", "fp32", "bf16", "bf16 alone"))
        dtype = "fp32" if fp32 else draw.choice(STATE_DTYPES)
        dtypes = (dtype, dtype if fp32 or draw.random() < 0.7 else draw.choice(STATE_DTYPES))
        places = [
            Place(grid, dtype, not grid.stage and draw.random() < 0.5)
            for grid, dtype in zip(draw.sample(GRIDS, 2), dtypes, strict=True)
        ]
        if all(fits(place, method, precision) for place in places):
            found.append(Move(*places, method, precision, draw.random() < 0.3))
    return found


def rows_are_equal(move: Move, folder: Path) -> None:
    """Save there, load here, save again: every logical row must be the same, bit for bit.

    Where ``state_dtype`` differs they must be what one rank makes of them, which has every tensor whole.

    Raises:
        AssertionError: a tensor differs; says which.
    """
    run_ranks(move.source.grid.world, train_and_save, move, str(folder))
    run_ranks(move.target.grid.world, load_and_save, move, str(folder), "here", 0)
    wanted = "there"
    if move.source.state_dtype != move.target.state_dtype:
        alone, wanted = replace(move, target=Place(ALONE, move.target.state_dtype)), "alone"
        if move.precision == "bf16":  # ZeRO 1 keeps masters as tensors of their own shape in one flat partition
            alone = replace(alone, target=Place(Grid(1, 1, 1, 1), move.target.state_dtype))
        run_ranks(1, load_and_save, alone, str(folder), "alone", 0)
    check_equal(tensors_of(folder / wanted), tensors_of(folder / "here"))


def curves(move: Move, folder: Path) -> tuple[list[float], list[float]]:
    """The losses of the next steps of a run that stayed, and of one that has moved."""
    run_ranks(move.source.grid.world, train_and_save, move, str(folder))
    stayed = replace(move, target=move.source)
    steps = STEPS - SAVED_AFTER
    return (
        run_ranks(move.source.grid.world, load_and_save, stayed, str(folder), "stayed", steps)[0],
        run_ranks(move.target.grid.world, load_and_save, move, str(folder), "here", steps)[0],
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    from ds_lowrank.checkpoint.common import tensor_files
    from ds_lowrank.checkpoint.manifest import read_manifest
    from ds_lowrank.checkpoint.reader import SavedTensors

    names = tensor_files(read_manifest(folder))
    with SavedTensors(folder, names) as saved:
        return {key: saved.whole(key) for key in saved}


def check_equal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Compare two checkpoints; 8-bit states that grids cut in different ways by the numbers that they stand for."""
    assert before.keys() == after.keys(), sorted(before.keys() ^ after.keys())[:4]
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor, after[key]), key


def train_and_save(move: Move, directory: str) -> None:
    """What each rank does there."""
    engine = started(move, move.source)
    for step in range(SAVED_AFTER):
        grids.train_step(engine, step)
    engine.save_checkpoint(directory, tag="there")


def load_and_save(move: Move, directory: str, tag: str, steps: int) -> list[float]:
    """What each rank does here; the losses of the next steps."""
    torch.manual_seed(99)
    engine = started(move, move.target)
    engine.load_checkpoint(directory, tag="there")
    engine.save_checkpoint(directory, tag=tag)
    return [mean_loss(engine, step) for step in range(SAVED_AFTER, SAVED_AFTER + steps)]


def started(move: Move, place: Place) -> Any:
    """A new engine."""
    grid, model = place.grid, {"tie_word_embeddings": move.tied}
    params: dict[str, Any] = {"state_dtype": place.state_dtype}
    if "int8" in (move.source.state_dtype, move.target.state_dtype):
        params |= IN_8_BITS.get(move.method, {})
    if place.projected:
        params["reduction"] = "projected"
    if move.precision == "bf16 alone":
        params["master_weights"] = False
    settings = config(grid.stage, grid.data, move.precision.split()[0], method=move.method, params=params)
    if grid.tensor == grid.pipeline == 1:
        import ds_lowrank

        return ds_lowrank.initialize(model=grids.dense_model(**model), config=settings)[0]
    return grids.start(grid, settings, **model)


def mean_loss(engine: Any, step: int) -> float:
    """The loss of one step, over the whole batch."""
    import torch.distributed as dist

    loss = torch.tensor(grids.train_step(engine, step), dtype=torch.float64, device="cpu")
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()
