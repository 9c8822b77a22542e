"""benchmarks/grid_bytes.py counts what a simulated world sends, and docs/communication.md says what it counted."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.grid_bytes import (
    KINDS,
    all_gathered,
    bases_kept,
    basis_gathered,
    counted,
    gathered,
    numbers_sent,
    simulated,
)
from benchmarks.grid_layout import Degrees, stage_on
from ds_lowrank.methods.galore import GaLoreOptions
from ds_lowrank.sharding.layout import length
from ds_lowrank.sharding.matrix import shard_of
from tests.unit.pages import PAGES, ROOT, rows

SMALL = {"hidden_size": 16, "intermediate_size": 40, "vocab_size": 24, "num_hidden_layers": 2}
OPTIONS = GaLoreOptions(rank=4)
KEEPING = GaLoreOptions(rank=4, basis_placement="replicated")
GRIDS = [
    *(Degrees(*degrees) for degrees in [(1, 2), (3, 2), (9, 1), (2, 4, 2)]),
    *(Degrees(*degrees, zero=3) for degrees in [(3, 2), (2, 4)]),
]
MEASURED, SIMULATED, REPLICATED = (
    json.loads((ROOT / f"docs/measured/{name}.json").read_text())["numbers"]
    for name in ("grid_bytes", "grid_bytes_simulated", "grid_bytes_replicated")
)
SECTION = "## What a step sends on a grid"


@pytest.mark.parametrize("options", [OPTIONS, KEEPING], ids=lambda options: options.basis_placement)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("degrees", GRIDS, ids=str)
def test_the_count_is_that_of_a_simulated_world(degrees, kind, options):
    for stage in range(degrees.pipeline):
        world = simulated(SMALL, degrees, stage, options, kind, device="cpu")
        for rank in {0, degrees.sharing - 1}:
            ledger = counted(SMALL, degrees, stage, options, kind, rank)
            assert (ledger.rounds, ledger.bytes_sent.tolist()) == (world.rounds, world.bytes_sent)


def of_all_ranks(axis):
    """The rows that all ranks hold of an axis beyond its rows."""
    return sum(length(spans) for spans in axis.held.values()) - axis.size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("degrees", GRIDS, ids=str)
def test_all_ranks_together_send_what_is_documented(degrees, kind):
    cells = dict(rows("communication", SECTION))
    stage, r, expected = stage_on(0, SMALL, degrees, 0, OPTIONS), 4, 0
    for matrix in stage.matrices:
        kept, compressed, root = matrix.geometry.kept, matrix.geometry.compressed, matrix.member.root
        known = {"r": r, "S": of_all_ranks, "c": compressed, "k": kept, "C": compressed.size, "K": kept.size}
        known["O"] = lambda axis, root=root: length(axis.owned.get(root, ()))
        expected += eval(cells[kind].strip("`"), known)
        assert basis_gathered(matrix, OPTIONS) == 4 * r * of_all_ranks(compressed)
    expected += eval(cells["decision"].strip("`"), {"N": stage.parameters, "W": degrees.sharing})
    assert sum(counted(SMALL, degrees, 0, OPTIONS, kind).bytes_sent) == 4 * expected


@pytest.mark.parametrize("degrees", GRIDS, ids=str)
def test_bases_that_stay_gathered_save_what_is_documented(degrees):
    """In an ordinary step one round and every basis; a refresh sends as much. A rank keeps the rows that it holds."""
    text = " ".join(PAGES["communication"].split())
    assert "`S(c)` is gone: `2 * r * S(k)` is left" in text
    stage = stage_on(0, SMALL, degrees, 0, KEEPING)
    usual, keeping = (counted(SMALL, degrees, 0, options, "ordinary") for options in (OPTIONS, KEEPING))
    assert keeping.rounds == usual.rounds - 1
    bases = sum(basis_gathered(matrix, OPTIONS) for matrix in stage.matrices)
    assert sum(usual.bytes_sent) - sum(keeping.bytes_sent) == bases
    usual, keeping = (counted(SMALL, degrees, 0, options, "refresh") for options in (OPTIONS, KEEPING))
    assert (usual.rounds, usual.bytes_sent.tolist()) == (keeping.rounds, keeping.bytes_sent.tolist())
    owned = sum(4 * 4 * matrix.geometry.compressed.size for matrix in stage.matrices)
    assert bases_kept(stage, KEEPING).sum() == bases + owned
    assert not bases_kept(stage, OPTIONS).any()


def test_the_table_of_bases_that_stay_gathered_is_what_was_measured():
    heads = ["GB, all ranks", "MB a rank", "MB, largest rank", "kept Q, MB a rank", "kept Q, MB, largest rank"]
    usual, known = (
        {
            (row["ZeRO"], f"{row['data']} x {row['tensor']} x {row['pipeline']}"): row
            for row in numbers
            if row["step"] == "ordinary"
        }
        for numbers in (MEASURED, REPLICATED)
    )
    documented = rows("communication", "### Bases that stay gathered")
    assert documented
    for zero, grid, *cells in documented:
        row, before = known[int(zero), grid], usual[int(zero), grid]
        assert cells == [
            f"{before['MB a rank']:.4g}",
            *(f"{row[head]:.4g}" for head in heads),
            f"{row['of gather']:.2f}",
        ]
    before, after = (numbers[1, "8 x 8 x 4"] for numbers in (usual, known))
    said = "an ordinary step falls from {:.4g} MB a rank to {:.4g}, and each rank keeps {:.4g} MB"
    text = " ".join(PAGES["communication"].split())
    assert said.format(before["MB a rank"], after["MB a rank"], after["kept Q, MB a rank"]) in text
    assert f"{after['rounds']} collectives instead of {before['rounds']}" in text


SPLITS = [
    (split, side.strip("`"), cells) for split, side, *cells in rows("communication", "### Matrices that are split")
]


@pytest.mark.parametrize(("split", "side", "cells"), SPLITS, ids=str)
@pytest.mark.parametrize(("d", "T"), [(1, 2), (1, 4), (2, 1), (2, 2), (4, 4)])
def test_a_split_matrix_sends_what_is_documented(split, side, cells, d, T):
    """Cut between rows: ZeRO 3 on 16 rows, or 16 / T."""
    stage = stage_on(0, SMALL, Degrees(d, T, zero=3), 0, GaLoreOptions(rank=4, proj_type=side))
    layer = {matrix.name.split(".")[4]: matrix.geometry for matrix in stage.matrices[:7]}
    shard = shard_of("w", layer["q_proj" if split.startswith("rows") else "o_proj"])
    m, n = shard.shape

    def rows_sent(ask):
        return numbers_sent(ask(torch.empty(1, 0, 1)), d * T).sum()

    found = [rows_sent(ask) for ask in (shard.compressed.all_gather, shard.kept.reduce_scatter)]
    assert found == [eval(cell.strip("`"), {"m": m, "n": n, "d": d, "T": T}) for cell in cells]
    assert rows_sent(shard.kept.all_gather) == found[1]


def test_the_peers():
    """A matrix of 16 x 16 in two equal blocks."""
    matrix = stage_on(0, SMALL, Degrees(1, 2), 0, OPTIONS).matrices[0]
    assert (all_gathered(matrix), gathered(matrix)) == (4 * 256, 2 * 4 * 128)


def test_the_table_at_7b_is_what_was_measured():
    heads = ["GB, all ranks", "gather Q, GB", "MB a rank", "MB, largest rank", "decision, kB a rank"]
    known = {
        (row["ZeRO"], f"{row['data']} x {row['tensor']} x {row['pipeline']}", row["step"]): [
            *(f"{row[head]:.4g}" for head in heads),
            *(f"{row[f'of {peer}']:.2f}" for peer in ("all-gather", "gather")),
        ]
        for row in MEASURED
    }
    documented = rows("communication", "### At 7B")
    assert documented
    for zero, grid, kind, *cells in documented:
        assert cells == known[int(zero), grid, kind], (zero, grid, kind)


def test_what_was_simulated_rank_by_rank_is_what_one_rank_told():
    assert len(SIMULATED) == 2 and all(row in MEASURED for row in SIMULATED)


def by_data(kind, zero, pipeline, head):
    """A column of what was measured at eight tensor-parallel ranks, by the number of data-parallel ranks."""
    wanted = {"ZeRO": zero, "tensor": 8, "pipeline": pipeline, "step": kind}
    return {row["data"]: row[head] for row in MEASURED if wanted.items() <= row.items()}


def test_what_is_said_of_the_size_of_the_world():
    text = " ".join(PAGES["communication"].split())
    ordinary, refresh = (by_data(kind, 3, 1, "MB a rank") for kind in ("ordinary", "refresh"))
    changes = [ordinary[128] / ordinary[8] - 1, refresh[128] / refresh[8] - 1, refresh[128] / refresh[16] - 1]
    said = "from 64 ranks to 1024 it changes by {:.1f} %, a refresh by {:.1f} % (from 128 ranks on by {:.1f} %)"
    assert said.format(*(100 * change for change in changes)) in text
    cut, falling = (by_data("ordinary", 1, 4, head) for head in ("GB, all ranks", "MB a rank"))
    growth = [100 * (cut[data] / cut[1] - 1) for data in (2, 4, 8, 32)]
    assert "grow by {:.1f} %, {:.1f} %, {:.1f} % and {:.0f} %".format(*growth) in text
    assert "from {:.4g} MB to {:.4g} and {:.4g}".format(*(falling[data] for data in (1, 8, 32))) in text
    decision = by_data("ordinary", 1, 4, "decision, kB a rank")
    shares = [decision[data] / falling[data] / 10 for data in (8, 128)]
    assert "{:.2f} % of an ordinary step at 8 x 8 x 4 and {:.1f} %".format(*shares) in text
    narrow = next(row for row in MEASURED if (row["tensor"], row["data"], row["step"]) == (1, 8, "ordinary"))
    assert f"{narrow['MB a rank']:.4g} MB a rank at 8 x 1 x 4, for {falling[8]:.4g} at 8 x 8 x 4" in text
    ratios = [1 / row["of all-gather"] for row in MEASURED if row["step"] == "ordinary"]
    assert f"sends {math.floor(min(ratios))} to {math.ceil(max(ratios))} times as much as an ordinary step" in text
    split = [row for row in MEASURED if row["tensor"] > 1 and row["step"] == "ordinary"]
    assert min(row["gather Q, GB"] / row["GB, all ranks"] for row in split) > 2 / 3
    assert {by_data(kind, 1, 4, "rounds")[data] for kind in KINDS for data in cut} == {13, 41}
    assert {by_data(kind, 3, 1, "rounds")[data] for kind in KINDS for data in ordinary} == {49, 161}
    assert "A step takes 13 collectives at 8 x 8 x 4 and 41 with a refresh" in text
    assert "without a pipeline 49 and 161." in text
