"""FRUGAL's signs where the subspace holds the gradient as a whole, and where it holds nothing of an element."""

from __future__ import annotations

import pytest
import torch

from tests.simulated.harness import ShardedMatrix, even_parts

GRADIENTS = {
    "all directions": (lambda shape: torch.randn(shape), 70),
    "a quarter of them": (lambda shape: torch.randn(shape[0], 16) @ torch.randn(16, shape[1]), 20),
    "rows of a millionth": (lambda shape: torch.randn(shape) * torch.logspace(0, -6, shape[0])[:, None], 70),
}


def after_steps(shape, ranks, make, **options):
    torch.manual_seed(0)
    matrix = ShardedMatrix("Frugal", torch.zeros(shape), even_parts(shape, ranks), lr=1e-2, eps=0.1, **options)
    gradient = make(shape)
    for factor in (1.0, -0.3, 1e-20):
        matrix.step(factor * gradient)
    return matrix.weight


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("shape", [(150, 70), (70, 150)])
def test_nothing_has_a_sign_where_the_subspace_holds_the_gradient(shape, ranks, name):
    make, rank = GRADIENTS[name]
    with_signs, without = (
        after_steps(shape, ranks, make, rank=rank, state_free_lr_scale=weight) for weight in (1.0, 0.0)
    )
    assert torch.equal(with_signs, without)


@pytest.mark.parametrize("ranks", [1, 3])
def test_all_elements_outside_of_the_chosen_columns_have_a_sign(ranks):
    shape, gradient = (40, 30), torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    matrix = ShardedMatrix("Frugal", torch.zeros(shape), even_parts(shape, ranks), lr=1.0, rank=9, projector="columns")
    matrix.step(gradient)
    bases = torch.cat([state["basis"] for state in matrix.states])
    chosen = bases.sum(1).bool()
    assert chosen.sum() == bases.sum() == 9
    assert torch.equal(-matrix.weight[:, ~chosen], gradient[:, ~chosen].sign())
    assert torch.allclose(-matrix.weight[:, chosen], gradient[:, chosen].sign(), atol=1e-3)  # Adam's first step
