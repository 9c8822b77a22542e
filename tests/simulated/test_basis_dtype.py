"""Bases in 16 and 4 bits: the same rounding on every layout, and none in a step that finds no basis."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from ds_lowrank.linalg.int4 import Int4
from ds_lowrank.methods import METHODS
from ds_lowrank.methods.blocks.basis_options import BasisOptions
from ds_lowrank.reference.galore import DenseGaLore
from tests.methods import dense, of
from tests.simulated.harness import ROUNDING, ShardedMatrix, assert_matches_reference, even_parts
from tests.simulated.moves import drawn_move, tried
from tests.simulated.test_basis_placement import KEEPING, StackedWorld

STORING = [name for name, method in METHODS.items() if issubclass(method.Options, BasisOptions)]


def formats_of(method):
    """The formats of a basis that a method takes."""
    for basis_dtype in ("bf16", "int4"):
        try:
            METHODS[method].Options(basis_dtype=basis_dtype)
        except ValueError:
            continue
        yield basis_dtype


CASES = [(method, basis_dtype) for method in STORING for basis_dtype in formats_of(method)]


def in_four_bits(basis):
    """Rounded as the documentation says: 64 rows of a column share a scale, a seventh of the largest, up to bf16."""
    found = basis.clone()
    for first in range(0, len(basis), 64):
        block = basis[first : first + 64]
        scale = block.abs().amax(0) / 7
        nearest = scale.bfloat16()
        above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
        upper = torch.where(nearest.float() < scale, above, nearest).float()
        steps = torch.where(upper > 0, block / upper, 0.0).round()
        found[first : first + 64] = steps * upper
    return found


class DenseQuantizedGaLore(DenseGaLore):
    """GaLore whose basis is rounded once the step that found it is over."""

    def step(self, G, lr=None):
        is_new = self.t == self.next_refresh
        super().step(G, lr)
        if is_new:
            self.basis = in_four_bits(self.basis)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("shape", [(150, 70), (70, 150)])
def test_galore_with_bases_in_four_bits_matches_a_dense_one(shape, ranks, monkeypatch):
    monkeypatch.setattr("tests.simulated.harness.dense", lambda _: DenseQuantizedGaLore)
    monkeypatch.setattr(DenseQuantizedGaLore, "__init__", _without_basis_dtype)
    assert_matches_reference("GaLore", shape, even_parts(shape, ranks), rank=5, update_proj_gap=3, basis_dtype="int4")


def _without_basis_dtype(self, weight, basis_dtype, **options):
    assert basis_dtype == "int4"
    DenseGaLore.__init__(self, weight, **options)


@pytest.mark.parametrize(("method", "basis_dtype"), CASES)
def test_every_layout_has_the_same_basis_and_a_step_without_a_new_one_changes_no_bit_of_it(method, basis_dtype):
    """The first step has the basis as it was found, so that it is that of the dense reference.

    A number on the boundary of its rounding may go either way in two layouts: here in none, or in one of thousands.
    """
    shape = of(method).fit((150, 70))
    torch.manual_seed(0)
    options = {"lr": 1e-2, "eps": 0.1, **of(method).cases[0], "basis_dtype": basis_dtype}
    start = of(method).start(shape)
    reference = dense(method)(start.clone(), **{key: value for key, value in options.items() if key != "basis_dtype"})
    one, three = (ShardedMatrix(method, start.clone(), even_parts(shape, ranks), **options) for ranks in (1, 3))
    gradients = of(method).gradients_for(shape)
    for step in range(4):
        torch.manual_seed(100 + step)
        gradient = gradients(step)
        before = [state["basis"].clone() for state in three.states]
        for matrix in (reference, one, three):
            matrix.step(gradient)
        if step == 0:
            assert (one.weight - reference.weight).norm() < ROUNDING * reference.weight.norm()
        assert (one.weight - three.weight).norm() < 1e-3 * one.weight.norm()
        if step % 2 and method != "OnlineSubspaceDescent" and method in KEEPING:
            assert all(torch.equal(a, state["basis"]) for a, state in zip(before, three.states, strict=True))
    assert one.states[0]["basis"].dtype == {"bf16": torch.bfloat16, "int4": torch.uint8}[basis_dtype]


@pytest.mark.parametrize(("method", "basis_dtype"), [case for case in CASES if case[0] in KEEPING])
def test_a_basis_that_stays_gathered_is_the_stored_one(method, basis_dtype):
    torch.manual_seed(0)
    options = of(method).cases[0] | {"lr": 1e-2, "eps": 0.1, "update_proj_gap": 4, "basis_dtype": basis_dtype}
    shape = of(method).fit((70, 20))
    starts = [of(method).start(shape) for _ in range(3)]
    worlds = [
        StackedWorld(method, [s.clone() for s in starts], 3, basis_placement=placement, **options)
        for placement in ("partitioned", "replicated")
    ]
    make = of(method).gradients_for(shape)
    for step in range(10):
        torch.manual_seed(step)
        gradients = [make(step) for _ in starts]
        for world in worlds:
            world.step(gradients)
        for a, b in zip(*(world.matrices for world in worlds), strict=True):
            assert torch.equal(a.weight, b.weight), step


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("saved_as", "loaded_as"), [("int4", "int4"), ("int4", "fp32"), ("bf16", "int4"), ("fp32", "bf16")]
)
def test_a_basis_moves_between_grids_and_formats(saved_as, loaded_as, seed, tmp_path):
    move = drawn_move(random.Random(seed), "GaLore")
    tried(replace(move, params=move.params | {"basis_dtype": saved_as}, basis_loaded_as=loaded_as), tmp_path)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (64, 3), (130, 5), (200, 8), (0, 3)])
def test_four_bits_are_nearest_and_what_is_decoded_is_encoded_to_the_same_bits(rows, columns):
    torch.manual_seed(0)
    values = torch.randn(2, rows, columns) * torch.logspace(-20, 3, columns)
    values[0, : min(rows, 64), 0] = 0
    like = Int4().tensors(rows, columns).items()
    stored, again = ({key: torch.zeros(2, *shape, dtype=dtype) for key, (shape, dtype) in like} for _ in range(2))
    Int4().encode(values, 0, torch.zeros(2), stored)
    decoded = Int4().decode(stored)
    assert torch.equal(decoded, torch.stack([in_four_bits(one) for one in values]))
    Int4().encode(decoded, 0, torch.zeros(2), again)
    assert all(torch.equal(stored[suffix], again[suffix]) for suffix in stored)
