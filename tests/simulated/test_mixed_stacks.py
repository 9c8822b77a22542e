"""Stacks make nothing less general: worlds of matrices that have little in common, stepped together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lowrank.methods import METHODS
from tests.methods import of
from tests.simulated.harness import even_parts, flat_parts, tensor_parallel_parts
from tests.simulated.mixed_worlds import BOUNDS, SHAPES, Layer, MixedWorld, Reference, assert_same_bits, starts_for
from tests.simulated.tensor_parallel import COMMON

EVERY = pytest.mark.parametrize("method", sorted(METHODS))
CHANGES = [
    {"lr": 3e-3, "weight_decay": 0.2},
    {"state_dtype": "int8"},
    {"state_dtype": "bf16", "lr": 3e-3},
    {"scale": 0.6},
    {"rank": 3},
    {"rank_max": 4},
    {"stagger": True},
    {"basis_placement": "replicated"},
    {"basis_placement": "replicated", "stagger": True, "lr": 3e-3},
]
"""What a second group may have of its own, if the method has the option."""


def draw_parts(draw, shape, ranks):
    """Even parts, any cuts, everything on one rank, or tensor-parallel blocks."""
    numel = shape[0] * shape[1]
    kind = draw(st.sampled_from(["even", "any", "one rank", *(["blocks"] if ranks == 4 else [])]))
    if kind == "even":
        return even_parts(shape, ranks)
    if kind == "blocks":
        return tensor_parallel_parts(shape, draw(st.sampled_from(["rows", "columns"])))
    if kind == "any":
        return flat_parts(shape, draw(st.lists(st.integers(0, numel), min_size=ranks - 1, max_size=ranks - 1)))
    alone = draw(st.integers(0, ranks - 1))
    return flat_parts(shape, [0] * alone + [numel] * (ranks - 1 - alone))


def draw_layers(draw, method, options, ranks):
    """Equal layers in two cuts and two groups, an odd one, a transposed one, and copies."""
    known = METHODS[method].Options.model_fields
    mini = options.get("mini") or options.get("rank", 0) is None
    changes = [c for c in CHANGES if c.keys() <= known.keys() and not (mini and "rank" in c)]
    first, second = dict(options), options | draw(st.sampled_from(changes))
    shape, odd = draw(st.permutations(SHAPES))[:2]
    places = st.sampled_from(["own", "flat", "flat", "fused"])
    alike, other = draw_parts(draw, shape, ranks), draw_parts(draw, shape, ranks)
    layers = [Layer(f"layers.{i}.a", shape, alike, first, draw(places)) for i in range(draw(st.integers(1, 4)))]
    layers += [Layer(f"layers.{i}.b", shape, other, second, draw(places)) for i in range(draw(st.integers(0, 2)))]
    layers.append(Layer("odd", odd, draw_parts(draw, odd, ranks), draw(st.sampled_from([first, second]))))
    if draw(st.booleans()):
        place = draw(st.sampled_from(["own", "fused"]))
        layers.append(Layer("layers.9.a", shape, alike, first, place, torch.bfloat16))
    if draw(st.booleans()):
        layers.append(Layer("conv", shape, alike, first, draw(places), transposed=True))
    if ranks > 1 and draw(st.booleans()):
        parts = draw_parts(draw, odd, -(-ranks // 2))
        for tensor in range(2):
            peers = tuple(range(tensor, ranks, 2))
            own = [parts[rank // 2] for rank in range(ranks)]
            if ranks % 2 and tensor:  # one rank less, which would have the last part
                own = [p for p in even_parts(odd, ranks // 2) for _ in range(2)] + [parts[0]]
            layers.append(Layer("copy", odd, own, second, draw(places), peers=peers))
    return layers


def draw_gradients(draw, method, layers, steps):
    """For every step and layer a gradient, zeros, or None; copies have the same."""
    seed, found = draw(st.integers(0, 999)), []
    numbers = {name: i for i, name in enumerate(dict.fromkeys(layer.name for layer in layers))}
    for step in range(steps):
        kinds = {name: draw(st.sampled_from(["some"] * 4 + ["zero", "missing"])) for name in numbers}
        gradients = []
        for layer in layers:
            shape = layer.shape[::-1] if layer.transposed else layer.shape
            number = 100 * numbers[layer.name] + step
            torch.manual_seed(1000 * seed + number)
            some = of(method).gradients_for(shape)(1000 * seed + number)
            kind = kinds[layer.name]
            gradients.append(some if kind == "some" else torch.zeros(shape) if kind == "zero" else None)
        found.append(gradients)
    return found


def spoiled(draw, gradients):
    """The gradients with one number that is not finite."""
    found = [gradient.clone() for gradient in gradients]
    found[draw(st.integers(0, len(found) - 1))][-1, -1] = draw(st.sampled_from([torch.nan, torch.inf, -1e20]))
    return found


@EVERY
def test_matrices_step_together_as_each_would_alone(method, monkeypatch):
    @settings(max_examples=6, deadline=None, database=None)
    @given(st.data())
    def check(data):
        draw = data.draw
        ranks = draw(st.integers(1, 5))
        options = COMMON | draw(st.sampled_from(of(method).cases))
        layers, steps = draw_layers(draw, method, options, ranks), draw(st.integers(4, 6))
        gradients = draw_gradients(draw, method, layers, steps)
        monkeypatch.setattr("ds_lowrank.optimizer.stacks.BUCKET_ELEMENTS", draw(st.sampled_from([2**28, 600, 1])))
        skipped_at, copied_at = draw(st.integers(1, steps)), draw(st.integers(1, steps))
        starts = starts_for(method, layers)
        together, alone = (
            MixedWorld(method, layers, [s.clone() for s in starts], ranks, together=each) for each in (True, False)
        )
        references = [Reference(method, layer, start.clone()) for layer, start in zip(layers, starts, strict=True)]
        for step, given_ in enumerate(gradients):
            if step == skipped_at:
                before = together.snapshot()
                some = [torch.ones_like(r.dense.weight) for r in references]
                assert together.step(spoiled(draw, some))
                assert_same_bits(together.snapshot(), before)
            if step == copied_at:
                together.replace_states()
            if all(gradient is None for gradient in given_):
                continue
            for world in (together, alone):
                assert not world.step(given_)
            for layer, reference, gradient, one, other in zip(
                layers, references, given_, together.weights, alone.weights, strict=True
            ):
                reference.step(gradient)
                error = reference.error(one)
                difference = (one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-30)
                exact = layer.options.get("state_dtype", "fp32") == "fp32"
                if exact or reference.steps <= 1:
                    assert error <= BOUNDS[layer.dtype], (layer.name, step, error)
                assert difference <= (BOUNDS[layer.dtype] if exact else 1e-3), (layer.name, step, difference)

    check()
