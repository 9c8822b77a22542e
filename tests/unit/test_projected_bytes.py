"""benchmarks/projected_bytes.py counts what a simulated world sends, and that is the sum of R and N that is owed."""

from __future__ import annotations

import pytest

from benchmarks.grid_bytes import KINDS, counted, simulated
from benchmarks.grid_layout import Degrees, parameters_of, stage_on
from benchmarks.projected_bytes import measure, ring
from ds_lowrank.methods.galore import GaLoreOptions

SMALL = {"hidden_size": 16, "intermediate_size": 48, "vocab_size": 24, "num_hidden_layers": 2}
RANK, RANKS = 4, 4
SIDES = ("std", "reverse_std")


def options(side: str) -> GaLoreOptions:
    return GaLoreOptions(rank=RANK, proj_type=side, reduction="projected")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_count_is_that_of_a_simulated_world(kind, side):
    degrees = Degrees(RANKS, tensor=1, zero=0)
    world = simulated(SMALL, degrees, 0, options(side), kind, device="cpu")
    for rank in (0, RANKS - 1):
        ledger = counted(SMALL, degrees, 0, options(side), kind, rank)
        assert (ledger.rounds, ledger.bytes_sent.tolist()) == (world.rounds, world.bytes_sent)


@pytest.mark.parametrize("side", SIDES)
def test_an_ordinary_step_sends_r_and_the_direction(side):
    degrees = Degrees(RANKS, tensor=1, zero=0)
    stage = stage_on(0, SMALL, degrees, 0, options(side))
    numbers = sum(RANK * matrix.geometry.kept.size for matrix in stage.matrices)
    decision = 4 * stage.parameters * (RANKS - 1)
    found = measure(SMALL, options(side), RANKS)
    # The reduce-scatter of R and the all-gather of N are together what a ring all-reduce of R would be.
    assert found["projected, MB"] * 1e6 == pytest.approx(ring(numbers, RANKS) + decision)


@pytest.mark.parametrize(("side", "kept"), [("std", (16, 48)), ("reverse_std", (16, 16))])
def test_the_share_of_the_whole_gradient_follows_from_the_kept_dimension(side, kept):
    square, wide = kept
    projected = 2 * RANK * (4 * square + 3 * wide)
    everything = sum(parameter.numel() for _, parameter in parameters_of(SMALL, Degrees(RANKS, 1), 0))
    rest = everything - 2 * (4 * 16 * 16 + 3 * 16 * 48)
    found = measure(SMALL, options(side), RANKS)
    decision = 4 * (2 * 7 + 2 * 2 + 3) * (RANKS - 1) / ring(everything, RANKS)
    assert found["of the whole"] == pytest.approx((projected + rest) / everything + decision)
