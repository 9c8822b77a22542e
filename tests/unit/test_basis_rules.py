"""Rules for the basis of Online Subspace Descent: betas of its own, a basis that is drawn, a rule of the user's."""

from __future__ import annotations

import itertools
import re
import sys

import pytest
import torch

import ds_lowrank
from ds_lowrank.reference import DenseOnlineSubspaceDescent
from ds_lowrank.reference.inner import Inner
from tests.simulated.harness import ShardedMatrix, even_parts
from tests.unit.pages import PAGES, weights

RULE = re.search(r"### A rule of your own\n.*?```python\n(.*?)```", PAGES["methods"], re.S)[1]
SHAPES = [(17, 9), (9, 17), (12, 12)]
OPTIONS = {"rank": 4, "lr": 1e-2, "betas": (0.7, 0.9)}
"""With a rate at which the basis visibly moves."""


class DenseNormalizedMomentum(Inner):
    """The rule of the page, on one process."""

    def __init__(self, beta1: float) -> None:
        self.beta1, self.b = beta1, torch.zeros(())

    def direction(self, R: torch.Tensor) -> torch.Tensor:
        self.b = self.beta1 * self.b + (1 - self.beta1) * R
        return self.b / self.b.norm()


@pytest.fixture
def rule(tmp_path, monkeypatch):
    """The page's rule in a file of its own, as a user would have it."""
    (tmp_path / "rules.py").write_text(RULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "rules:NormalizedMomentum"
    sys.modules.pop("rules", None)


@pytest.mark.parametrize(("ranks", "shape"), itertools.product([1, 2, 3, 5], SHAPES), ids=str)
@pytest.mark.parametrize("betas", [None, (0.5, 0.8)])
def test_a_rule_of_the_user_matches_the_dense_reference_on_every_world(rule, ranks, shape, betas):
    options = {**OPTIONS, "basis_betas": betas}
    dense = DenseOnlineSubspaceDescent(torch.zeros(shape), **options)
    dense.basis_optimizer = DenseNormalizedMomentum((betas or OPTIONS["betas"])[0])
    sharded = ShardedMatrix(
        "OnlineSubspaceDescent", torch.zeros(shape), even_parts(shape, ranks), basis_optimizer=rule, **options
    )
    torch.manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(shape)
        dense.step(gradient)
        sharded.step(gradient)
        assert (sharded.weight - dense.weight).norm() < 2e-6 * dense.weight.norm()


def test_the_state_of_a_rule_is_saved_and_loaded(rule):
    def optimizer():
        made = ds_lowrank.OnlineSubspaceDescent(weights((12, 8)), rank=3, basis_optimizer=rule, lr=1e-2)
        return made, made.param_groups[0]["params"][0]

    (first, weight), (second, copied) = optimizer(), optimizer()
    torch.manual_seed(0)
    gradients = torch.randn(6, 12, 8)
    for gradient in gradients[:3]:
        weight.grad = gradient
        first.step()
    copied.data.copy_(weight)
    second.load_state_dict(first.state_dict())
    for gradient in gradients[3:]:
        for optimizer, parameter in ((first, weight), (second, copied)):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(weight, copied)


@pytest.mark.parametrize("basis_optimizer", ["lion", "adam"])
def test_betas_of_the_weights_are_not_those_of_the_basis(basis_optimizer):
    torch.manual_seed(0)
    gradients = torch.randn(4, 12, 8)
    bases = []
    for betas in ((0.9, 0.999), (0.5, 0.6)):
        matrix = ShardedMatrix(
            "OnlineSubspaceDescent",
            torch.zeros(12, 8),
            even_parts((12, 8), 2),
            **{**OPTIONS, "betas": betas, "basis_betas": (0.8, 0.9), "basis_optimizer": basis_optimizer},
        )
        for gradient in gradients:
            matrix.step(gradient)
        bases.append(torch.cat([state["basis"] for state in matrix.states]))
    assert torch.equal(*bases)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_random_basis_is_orthonormal_and_changes_every_t_steps_only(ranks):
    shape = (14, 10)
    options = {"rank": 4, "basis_optimizer": "random", "update_proj_gap": 3}
    matrix = ShardedMatrix("OnlineSubspaceDescent", torch.zeros(shape), even_parts(shape, ranks), **options)
    bases = []
    for step in range(7):
        # Gradients of zeros do not matter to a basis that is drawn.
        matrix.step(torch.randn(shape) * (step != 3))
        bases.append(torch.cat([state["basis"] for state in matrix.states]))
    for basis in bases:
        assert torch.allclose(basis.T @ basis, torch.eye(4), atol=1e-6)
    assert [torch.equal(a, b) for a, b in itertools.pairwise(bases)] == [True, True, False, True, True, False]
    assert not torch.equal(bases[0], bases[-1])


def test_a_random_basis_is_uniform():
    """Its projector's mean over draws is r / d times the identity."""
    from ds_lowrank.linalg.orthonormal import orthonormal
    from ds_lowrank.linalg.sketch import normal

    names = [f"w{i}" for i in range(4000)]
    basis = orthonormal(normal(0, names, 0, (0, 6), (0, 2), torch.device("cpu")))
    mean = (basis @ basis.mT).mean(0)
    assert (mean - torch.eye(6) / 3).abs().max() < 0.03
