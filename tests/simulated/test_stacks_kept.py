"""Stacks of worlds that are given: their rounds, their plans, and what they keep between steps."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from ds_lowrank.methods import METHODS
from tests.methods import of, taken
from tests.rows.vlorp import VLORP
from tests.simulated.harness import even_parts, flat_parts
from tests.simulated.mixed_worlds import BOUNDS, SHAPES, Layer, MixedWorld, Reference, assert_same_bits, starts_for
from tests.simulated.tensor_parallel import COMMON

EVERY = pytest.mark.parametrize("method", sorted(METHODS))
OFFICIAL_VIEW = VLORP | {"granularity": 3, "left_view": "official"}


def mixed_layers(method, ranks, copies=1, **changes):
    """Matrices of several cuts, groups and places, each as often as asked."""
    options = COMMON | of(method).cases[0]
    options |= taken(method, changes, options)
    other, layers = options | {"lr": 3e-3}, []
    for i in range(copies):
        shape, odd = SHAPES[0], SHAPES[2]
        layers += [
            Layer(f"layers.{i}.a", shape, even_parts(shape, ranks), options, "flat"),
            Layer(f"layers.{i}.b", shape, flat_parts(shape, [0] * (ranks - 1)), options),
            Layer(f"layers.{i}.c", shape, even_parts(shape, ranks), other, "fused"),
            Layer(f"layers.{i}.d", odd, flat_parts(odd, [odd[0] * odd[1]] * (ranks - 1)), options),
            Layer(f"layers.{i}.e", odd, even_parts(odd, ranks), options, transposed=True),
        ]
    return layers


def step_through(world, method, steps, copies=1):
    """Step a world on gradients that are a function of the step and of the layer's number in its copy."""
    for step in steps:
        once = []
        for number, layer in enumerate(world.layers[: len(world.layers) // copies]):
            torch.manual_seed(100 * step + number)
            shape = layer.shape[::-1] if layer.transposed else layer.shape
            once.append(of(method).gradients_for(shape)(100 * step + number))
        world.step(once * copies)
        yield world


def world_of(method, layers, ranks):
    return MixedWorld(method, layers, starts_for(method, layers), ranks)


@EVERY
def test_rounds_do_not_depend_on_how_many_matrices_and_stacks_there_are(method):
    found = [
        [world.rounds for world in step_through(world_of(method, mixed_layers(method, 3, n), 3), method, range(4), n)]
        for n in (1, 3)
    ]
    assert found[0] == found[1]


@EVERY
def test_ordinary_steps_are_planned_once(method):
    world = world_of(method, mixed_layers(method, 3, update_proj_gap=50), 3)
    counts = [[len(plans._plans) for plans in world.world._plans] for _ in step_through(world, method, range(20))]
    assert counts[19] == counts[4]


@EVERY
@pytest.mark.parametrize("placement", ["partitioned", "replicated"])
def test_states_that_are_replaced_by_copies_change_no_bit(method, placement):
    worlds = [world_of(method, mixed_layers(method, 3, basis_placement=placement), 3) for _ in range(2)]
    for step, _ in enumerate(zip(*(step_through(world, method, range(6)) for world in worlds), strict=True)):
        if step % 2:
            worlds[1].replace_states()
        assert_same_bits(worlds[0].snapshot(), worlds[1].snapshot())


@EVERY
def test_matrices_that_other_ranks_hold_are_one_stack_for_each_phase(method):
    layers = [
        Layer(f"{i}", shape, flat_parts(shape, [shape[0] * shape[1]] * 2), COMMON | of(method).cases[0])
        for i, shape in enumerate(SHAPES)
    ]
    for layer in layers[1:]:
        layer.options = layers[0].options
    world = world_of(method, layers, 3)
    for _ in step_through(world, method, range(2)):
        for rank in (1, 2):
            (bucket,) = world.stacks[0][rank].buckets(world.matrices[rank])
            assert [len(stack.matrices) for stack in bucket] == [len(layers)]


@pytest.mark.parametrize("method", [m for m in sorted(METHODS) if "stagger" in METHODS[m].Options.model_fields])
def test_staggered_refreshes_of_a_stack_are_those_of_its_matrices(method):
    options = COMMON | of(method).cases[0] | {"stagger": True, "update_proj_gap": 3}
    layers = [Layer(f"layers.{i}.a", SHAPES[0], even_parts(SHAPES[0], 2), options) for i in range(4)]
    world = world_of(method, layers, 2)
    references = [Reference(method, *pair) for pair in zip(layers, [w.clone() for w in world.weights], strict=True)]
    for step in range(6):
        torch.manual_seed(step)
        gradients = [torch.randn(SHAPES[0]) for _ in layers]
        world.step(gradients)
        for reference, gradient, weight in zip(references, gradients, world.weights, strict=True):
            reference.step(gradient)
            assert reference.error(weight) <= BOUNDS[torch.float32]


KEEPING = [m for m in sorted(METHODS) if "basis_placement" in METHODS[m].Options.model_fields]


@pytest.mark.parametrize("method", KEEPING)
def test_a_gathered_basis_is_forgotten_where_a_refresh_was_in_another_company(method):
    """The first two are refreshed without the third, while what they kept together with it is older."""
    options = COMMON | of(method).cases[0] | {"update_proj_gap": 4}
    results = []
    for placement in ("partitioned", "replicated"):
        chosen = options | {"basis_placement": placement}
        layers = [Layer(f"layers.{i}.a", SHAPES[0], even_parts(SHAPES[0], 2), chosen) for i in range(3)]
        world = world_of(method, layers, 2)
        for step in range(8):
            gradients = []
            for i in range(3):
                torch.manual_seed(10 * step + i)
                gradients.append(of(method).gradients_for(SHAPES[0])(10 * step + i))
            world.step([*gradients[:2], None if step in (2, 4) else gradients[2]])
        results.append(world.weights)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@EVERY
def test_a_rank_without_elements_sums_each_matrix_over_its_own_peers(method):
    """Rank 0 has nothing of two matrices, of which all ranks share one and ranks 0 and 2 the other."""
    options, shape = COMMON | of(method).cases[0], SHAPES[0]
    on_rank_2, on_rank_3 = flat_parts(shape, [0, 0, 288]), flat_parts(shape, [0, 0, 0])
    layers = [
        Layer("all", shape, on_rank_3, options),
        Layer("copy", shape, on_rank_2, options, peers=(0, 2)),
        Layer("copy", shape, on_rank_3, options, peers=(1, 3)),
    ]
    world = world_of(method, layers, 4)
    references = [Reference(method, *pair) for pair in zip(layers, [w.clone() for w in world.weights], strict=True)]
    for step in range(4):
        torch.manual_seed(step)
        gradients = [of(method).gradients_for(shape)(step), of(method).gradients_for(shape)(step + 10)]
        gradients.append(gradients[1])
        world.step(gradients)
        for reference, gradient, weight in zip(references, gradients, world.weights, strict=True):
            reference.step(gradient)
            assert reference.error(weight) <= BOUNDS[torch.float32]


@pytest.mark.parametrize(
    ("method", "options"), [*((m, of(m).cases[0]) for m in sorted(METHODS)), ("VLoRP", OFFICIAL_VIEW)], ids=str
)
def test_nothing_keeps_gradients_after_a_step(method, options):
    layers = [Layer("w", SHAPES[0], even_parts(SHAPES[0], 2), COMMON | options)]
    world = world_of(method, layers, 2)
    for _ in step_through(world, method, range(2)):
        stores = [matrices[0].fragment.store for matrices in world.matrices]
        gradients = [weakref.ref(store.grad.untyped_storage()) for store in stores]
        for store in stores:
            store.grad = torch.zeros_like(store)
        gc.collect()
        assert all(gradient() is None for gradient in gradients)
