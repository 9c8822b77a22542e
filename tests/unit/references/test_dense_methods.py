"""What holds for every dense reference."""

from __future__ import annotations

import pytest

from ds_lowrank.reference import DENSE
from tests.unit.references.common import close, gaussian


@pytest.mark.parametrize("name", DENSE)
def test_transposed_weight_is_changed_in_place_and_alike(name):
    """``std`` picks the side by the shape: the transposed problem has the transposed solution.

    SCALE's default side is that of the output units, whatever the shape.
    """
    options = {"VLoRP": {"granularity": 2}, "Scale": {"proj_type": "std"}}.get(name, {})
    weight = gaussian(12, 8, seed=3)
    turned = weight.clone()
    straight = DENSE[name](weight, weight_decay=0.1, **options)
    turned_too = {"norm_axis": "input"} if name == "GradNormLoRP" else {}
    transposed = DENSE[name](turned.T, weight_decay=0.1, **options, **turned_too)
    for step in range(3):
        gradient = gaussian(12, 8, seed=step)
        straight.step(gradient)
        transposed.step(gradient.T)
    assert close(turned, weight)
