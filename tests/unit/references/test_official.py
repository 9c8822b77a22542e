"""The package against the published codes of VLoRP and of Online Subspace Descent, over twenty scheduled steps.

What is compared is the displacement: the largest ``|W_ours - W_theirs| / |W_theirs - W_0|`` of all steps.
"""

from __future__ import annotations

import pytest
import torch

import ds_lowrank
from tests.unit.references.official import OfficialOnlineSubspaceDescent, OfficialProjFactor

SHAPES = {"tall": (48, 20), "wide": (20, 48), "square": (32, 32)}
STEPS, LR = 20, 1e-2


def displacement_error(make_ours, make_theirs, shape, size=1.0, turned=False):
    """The largest difference over the distance from the start.

    Args:
        make_ours: builds the package's optimizer from its parameters.
        make_theirs: builds the oracle from its weight; returns a function of gradient and learning rate.
        shape: of the matrix.
        size: of the gradients' elements.
        turned: whether the oracle sees the transposed matrix.
    """
    torch.manual_seed(0)
    start = 0.02 * torch.randn(shape)
    weight = torch.nn.Parameter(start.clone())
    theirs = (start.T if turned else start).contiguous()
    first, worst = theirs.clone(), 0.0
    ours, step_theirs = make_ours([("w", weight)]), make_theirs(theirs)
    for step in range(STEPS):
        lr = LR * min(1, (step + 1) / 5)
        gradient = size * torch.randn(shape)
        weight.grad, ours.param_groups[0]["lr"] = gradient.clone(), lr
        ours.step()
        step_theirs(gradient.T.contiguous() if turned else gradient, lr)
        own = weight.detach().T if turned else weight.detach()
        worst = max(worst, ((own - theirs).norm() / (theirs - first).norm()).item())
    return worst


PROJFACTOR = [(4, 4, 1.0, 1.0, 0.1), (1, 4, 0.25, 1e-6, 0.0), (4, 1, 0.25, 1e-4, 0.1), (4, 0.25, 1.0, 1.0, 0.1)]
"""Rank, granularity, scale, the size of gradients beside the published epsilon of 1e-6, and weight decay, none where a
step is so small that the weights' own rounding is a part of it."""


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("rank", "c", "scale", "size", "decay"), PROJFACTOR)
@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_vlorp_equals_the_official_code(dist, rank, c, scale, size, decay, shape):
    distribution = {"normal": "gaussian"}.get(dist, dist)
    common = {"rank": rank, "update_proj_gap": 6, "scale": scale}

    def make_ours(named):
        view = {"granularity": c, "left_view": "official", "distribution": distribution}
        return ds_lowrank.VLoRP(named, lr=LR, weight_decay=decay, weight_decay_order="after", **common, **view)

    def make_theirs(weight):
        return OfficialProjFactor(weight, factor=c, dist=dist, eps=1e-6, decay=decay, **common).step

    assert displacement_error(make_ours, make_theirs, shape, size) < 1e-5


def test_vlorp_by_default_cuts_a_wide_matrix_as_the_official_code_cuts_its_transpose():
    def make_theirs(weight):
        return OfficialProjFactor(weight, 4, 4, update_proj_gap=100, scale=1.0, dist="normal", eps=1e-6).step

    def make_ours(named):
        return ds_lowrank.VLoRP(named, lr=LR, granularity=4)

    assert displacement_error(make_ours, make_theirs, (20, 48), turned=True) < 1e-5


OSD = [("adam", "adam", (0.9, 0.999)), ("adam", "sgd", (0.9, 0.999)), ("lion", "lion", (0.9, 0.99))]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("rule", "basis_rule", "betas"), OSD)
def test_online_subspace_descent_equals_the_official_code(rule, basis_rule, betas, shape):
    """Without lambda, at the published rate of the basis. An epsilon of 1e-12: theirs are one for W, beside an
    uncorrected root, and another for P, beside a corrected one.
    """
    gap, lion = 20, rule == "lion"
    common = {"rank": 6, "eps": 1e-12, "betas": betas}

    def make_ours(named):
        basis = {"basis_optimizer": basis_rule, "basis_init": "svd", "pca_lambda": 0.0}
        rates = {"basis_lr_ratio": 1 / (gap * LR), "basis_weight_decay": 0.0 if basis_rule == "sgd" else 0.01}
        inner = {"inner": "lion", "lion_sign": "original", "scale": 1.0} if lion else {}
        return ds_lowrank.OnlineSubspaceDescent(named, lr=LR, **basis, **rates, **inner, **common)

    def make_theirs(weight):
        return OfficialOnlineSubspaceDescent(
            weight, LR, scale=0.25, update_proj_gap=gap, rule=rule, basis_rule=basis_rule, **common
        ).step

    assert displacement_error(make_ours, make_theirs, shape) < 1e-5
