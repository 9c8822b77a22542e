"""Checkpoints that move between simulated grids: every logical row is the same, bit for bit, wherever it was cut."""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lowrank.methods import METHODS
from tests.simulated.move_worlds import World
from tests.simulated.moves import Move, Rank, drawn_move, load, save, tried

WORLDS = st.builds(
    World,
    data=st.integers(1, 4),
    tensor=st.sampled_from([1, 2]),
    pipeline=st.sampled_from([1, 2]),
    cut=st.sampled_from(["zero", "whole", "projected"]),
    layers=st.sampled_from(["megatron", "autotp"]),
    seed=st.integers(0, 999),
)
DTYPES = st.sampled_from(["fp32", "bf16", "int8"])


@pytest.mark.parametrize("method", METHODS)
def test_every_row_is_the_same_on_another_grid(method, tmp_path):
    tried(drawn_move(random.Random(method), method), tmp_path)


@settings(max_examples=6, deadline=None)
@given(WORLDS, WORLDS, DTYPES, DTYPES)
def test_any_cuts(source, target, saved_as, loaded_as):
    with tempfile.TemporaryDirectory() as folder:
        tried(Move(source, target, "GaLore", {"rank": 4}, saved_as, loaded_as), Path(folder))


ELEMENTS = [
    ("VLoRP", {"rank": 2, "granularity": 3, "update_scheme": "original_space"}),
    ("Lorenza", {"rank": None}),
    ("GaLore", {"rank": 4}),
]


@pytest.mark.parametrize(("method", "params"), ELEMENTS, ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_moments_of_single_elements_of_a_matrix_that_is_split_along_columns(method, params, dtype, tmp_path):
    """In 8 bits their blocks are of that grid alone: they are saved as numbers, and are the same numbers there."""
    split = World(3, 2, 1, "zero", "megatron", 7)
    (tmp_path / "elsewhere").mkdir()
    tried(Move(split, replace(split, seed=8), method, params, dtype, dtype), tmp_path / "elsewhere")
    again = [Rank(split, place, method, {**params, "state_dtype": dtype}) for place in split.ranks()]
    for rank in again:
        rank.fill(5)
    before = [decoded(rank) for rank in again]
    folder = tmp_path / "again"
    folder.mkdir()
    save(again, folder)
    loaded = load(split, method, {**params, "state_dtype": dtype}, [rank.plain() for rank in again], folder)
    for own, rank in zip(before, loaded, strict=True):
        found = decoded(rank)
        assert own.keys() == found.keys()
        assert all(torch.equal(own[key], found[key]) for key in own)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_state_without_numbers_moves(dtype, tmp_path):
    params = {"rank": 2, "granularity": 3, "update_scheme": "sgd"}
    tried(Move(World(3, 2, 1, "zero", "megatron", 7), World(2), "VLoRP", params, dtype, dtype), tmp_path)


def decoded(rank):
    """The numbers of a rank's states."""
    return {
        (slot.tag.name, key): spec.decode({suffix: slot.state[key + suffix][None] for suffix in spec.tensors})[0]
        for slot in rank.slots
        for key, spec in rank.specs_of(slot).items()
    }


def test_copies_that_are_cut_in_different_ways_are_written_once(tmp_path):
    """Beside shards that differ in size, ZeRO cuts what tensor-parallel ranks have copies of at different places."""
    source = World(3, 2, 1, "zero", "autotp", 5)
    sizes = tried(Move(source, World(1), "GaLore", {"rank": 4}, "fp32", "fp32"), tmp_path)
    assert sizes["files"] - sizes["headers"] == sizes["held"]


def test_no_replica_is_written_twice(tmp_path):
    """Every rank of the world has everything, and the files have it once."""
    source = World(4, 1, 1, "whole")
    sizes = tried(Move(source, World(2), "GaLore", {"rank": 4}, "fp32", "fp32"), tmp_path)
    assert sizes["files"] - sizes["headers"] == sizes["held"]
