"""The dense SubTrack++: what follows from its equations."""

from __future__ import annotations

import itertools

from ds_lowrank.reference.galore import DenseGaLore
from ds_lowrank.reference.subtrack import DenseSubTrack
from tests.unit.references.common import close, gaussian, matrix_with, zeros


def test_without_steps_and_rest_it_is_galore_with_its_first_basis():
    options = {"rank": 3, "lr": 1e-2, "scale": 0.5}
    dense = DenseSubTrack(zeros(12, 8), step_size=0.0, recovery_scaling=False, update_proj_gap=2, **options)
    galore = DenseGaLore(zeros(12, 8), update_proj_gap=10**9, **options)
    for step in range(6):
        gradient = gaussian(12, 8, seed=step)
        dense.step(gradient)
        galore.step(gradient)
    assert close(dense.weight, galore.weight)


def test_tracking_approaches_a_subspace_that_stays():
    """The first gradient has another one; steps of a tenth of a right angle or less."""
    dense = DenseSubTrack(zeros(12, 8), rank=2, update_proj_gap=1, step_size=0.01, projector="svd")
    dense.step(gaussian(12, 8, seed=9))
    gradient = matrix_with([4.0, 3.0, 0.3, 0.2])
    whole, errors = gradient.norm(), []
    for _ in range(60):
        dense.step(gradient)
        errors.append((gradient - gradient @ dense.basis @ dense.basis.T).norm() / whole)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1.01 * (0.3**2 + 0.2**2) ** 0.5 / whole


def test_a_growing_rest_is_limited():
    dense = DenseSubTrack(zeros(12, 8), rank=2, update_proj_gap=10, norm_growth_limit=1.5)
    sizes = []
    for step in range(5):
        dense.step(gaussian(12, 8, seed=step))
        sizes.append(dense.previous)
    assert all(after <= 1.5 * before * (1 + 1e-12) for before, after in itertools.pairwise(sizes))
