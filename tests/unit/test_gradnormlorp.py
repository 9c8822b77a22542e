"""GradNormLoRP on full weights: its tangent map, its magnitudes, and units without a direction."""

import pytest
import torch

import ds_lowrank
from ds_lowrank.methods.blocks.weight_norm import Frame, Tangent
from ds_lowrank.reference.gradnormlorp import DenseGradNormLoRP
from ds_lowrank.sharding.geometry import Geometry
from ds_lowrank.sharding.layout import whole
from ds_lowrank.sharding.matrix import shard_of
from ds_lowrank.sharding.world import SimulatedWorld
from tests.simulated.harness import ShardedMatrix, even_parts

AXES = pytest.mark.parametrize(("norm_axis", "dim"), [("output", 1), ("input", 0)])


def by_the_definition(v, g, dim):
    return g * v / v.norm(dim=dim, keepdim=True)


def mapped(weight, gradient, magnitude, length, norm_axis):
    """What :class:`Tangent` makes of a gradient for ``v = W length / magnitude``: as a matrix, and as its products."""
    dim = 1 if norm_axis == "output" else 0
    (m, n), geometry = weight.shape, Geometry(tuple(weight.shape), [whole(weight.shape)], 0, "right")
    shard = shard_of("w", geometry, gradient.reshape(-1), weight.reshape(-1))
    a = (gradient * weight).sum(dim) / weight.square().sum(dim)
    axis = shard.rows if norm_axis == "output" else shard.columns
    frame = Frame((magnitude.flatten() / length).view(1, -1, 1), a.view(1, -1, 1), torch.empty(0))
    tangent = Tangent(shard, axis, frame)
    (piece,) = tangent.gradient.pieces
    by_columns, by_rows = tangent.times(torch.eye(n).unsqueeze(0)), tangent.transposed_times(torch.eye(m).unsqueeze(0))
    return [tangent.dense_gradient(piece)[0], by_columns[0], by_rows[0].T]


@AXES
def test_the_tangent_map_is_the_gradient_of_weight_normalisation(norm_axis, dim):
    """Against finite differences of the definition in fp64, which gradcheck takes, and against autograd."""
    torch.manual_seed(0)
    v = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(7, 1, dtype=torch.float64) if dim == 1 else torch.randn(1, 5, dtype=torch.float64)
    g.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, g: by_the_definition(v, g, dim), (v, g))
    weight = by_the_definition(v, g, dim)
    gradient = torch.randn(7, 5)
    expected, _ = torch.autograd.grad(weight, (v, g), gradient.double())
    length = v.detach().norm(dim=dim).float()
    for found in mapped(weight.detach().float(), gradient, g.detach().float(), length, norm_axis):
        assert (found - expected).norm() < 1e-6 * expected.norm()


@AXES
def test_the_direction_s_gradient_is_at_right_angles_to_it(norm_axis, dim):
    torch.manual_seed(0)
    weight, gradient = torch.randn(50, 70), torch.randn(50, 70)
    size = weight.shape[1 - dim]
    for found in mapped(weight, gradient, torch.ones(size), torch.ones(size), norm_axis):
        cosine = (found * weight).sum(dim) / (found.norm(dim=dim) * weight.norm(dim=dim))
        assert cosine.abs().max() < 1e-6


@AXES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_as_learned_and_the_magnitudes_are_kept(norm_axis, dim, dtype):
    """A weight in bf16 has its elements rounded to 2^-9, and its norm with them, each one its own way."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(24, 16).to(dtype))
    start = weight.detach().float().norm(dim=dim)
    options = {"rank": 4, "update_proj_gap": 3, "norm_axis": norm_axis}
    optimizer = ds_lowrank.GradNormLoRP([("w", weight)], lr=1e-2, **options)
    before = None
    for step in range(7):
        weight.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.step()
        learned = optimizer.state_dict()["state"]["w"]["magnitude"].squeeze(1).clone()
        norms = weight.detach().float().norm(dim=dim)
        assert torch.allclose(norms, learned.abs(), rtol=1e-6 if dtype == torch.float32 else 3e-3)
        # Adam moves a magnitude by at most some learning rates in a step; it goes on from where it was.
        assert before is None or (learned - before).abs().max() < 0.05
        before = learned
    assert (before - start).abs().min() > 1e-3


def test_units_of_zeros_start_to_move_and_get_their_length_from_that():
    torch.manual_seed(0)
    weight = torch.randn(9, 6)
    weight[2] = 0
    parameter, twin = torch.nn.Parameter(weight.clone()), DenseGradNormLoRP(weight.clone(), lr=1e-2, rank=3)
    optimizer = ds_lowrank.GradNormLoRP([("w", parameter)], lr=1e-2, rank=3)
    for step in range(4):
        parameter.grad = torch.randn(9, 6, generator=torch.Generator().manual_seed(10 + step))
        twin.step(parameter.grad)
        optimizer.step()
        assert parameter.isfinite().all() and parameter[2].norm() > 0
        assert (parameter - twin.weight).norm() < 1e-6 * twin.weight.norm()


def test_a_magnitude_that_crosses_zero_turns_its_unit_round():
    torch.manual_seed(0)
    start = torch.randn(5, 4)
    start[0] *= 0.05 / start[0].norm()
    single = ShardedMatrix("GradNormLoRP", start.clone(), even_parts((5, 4), 2), lr=0.1, rank=2, scale=0.1)
    twin = DenseGradNormLoRP(start.clone(), lr=0.1, rank=2, scale=0.1)
    assert isinstance(single.world, SimulatedWorld)
    for _ in range(3):
        gradient = torch.randn(5, 4)
        gradient[0] += 3 * start[0] / start[0].norm()  # pulls the magnitude down, a learning rate a step
        twin.step(gradient)
        single.step(gradient)
    assert twin.g[0] < 0
    assert (single.weight[0] * start[0]).sum() < 0
    assert (single.weight - twin.weight).norm() < 1e-5 * twin.weight.norm()


def test_vectors_are_left_to_adamw():
    layer = torch.nn.Linear(6, 4)
    torch.nn.init.zeros_(layer.bias)
    optimizer = ds_lowrank.GradNormLoRP(layer, rank=2)
    layer(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    assert layer.bias.isfinite().all() and (layer.bias != 0).all()
    assert [slot.role.reason for slot in optimizer.slots] == ["matrix", "1-D"]
