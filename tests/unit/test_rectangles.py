"""Rectangles of saved tensors: that none has an element of another is found without a look at every element."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lowrank.sharding.layout import Rectangle
from ds_lowrank.sharding.pieces import are_disjoint

SIDES = st.integers(0, 4)
RECTANGLES = st.lists(st.builds(Rectangle, SIDES, SIDES, SIDES, SIDES, st.just(0)), max_size=5)


@settings(max_examples=300, deadline=None)
@given(RECTANGLES)
def test_disjoint_means_that_no_element_is_counted_twice(rectangles):
    counts = torch.zeros(8, 8)
    for r in rectangles:
        counts[r.row : r.row + r.height, r.col : r.col + r.width] += 1
    assert are_disjoint(rectangles) == bool((counts <= 1).all())


def test_sizes_of_terabytes_take_no_time():
    big = Rectangle(0, 0, 10**12, 10**12, 0)
    assert are_disjoint([big, Rectangle(10**12, 5, 10**12, 7, 0)])
    assert not are_disjoint([big, Rectangle(10**12 - 1, 5, 10**12, 7, 0)])
