"""Torch's default dtype and default device, which a user's script may set, change no bit of what is computed."""

from __future__ import annotations

import copy

import pytest
import torch

import ds_lowrank
from ds_lowrank.adapters.model import add_adapters, merge_adapters
from ds_lowrank.integration.forward_backward import forward_backward
from tests.contract.cases import EVERY, PROBES, assert_equal, build, copy_of, perturbed, small_model, take_gradients
from tests.foreign import DEFAULTS, defaults, under_foreign_defaults
from tests.methods import cases, of
from tests.simulated.harness import ShardedMatrix, even_parts

FOREIGN = pytest.mark.parametrize("foreign", sorted(DEFAULTS))
STEPS = 4


def tensors_of(state):
    """The tensors of a ``state_dict``, in order."""
    return [value for slot in state["state"].values() for value in slot.values() if torch.is_tensor(value)]


def trained(name, context, dtype=torch.float32, **options):
    """Train with everything that is the optimizer's inside a context; weights and state in the end."""
    model = small_model().to(dtype)
    with context():
        optimizer = build(name, model, **options)
    for step in range(STEPS):
        take_gradients_in(model, step, dtype)
        with context():
            optimizer.step()
            optimizer.metrics()
    with context():
        resumed = build(name, twin := copy.deepcopy(model), **options)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_gradients_in(twin, STEPS, dtype)
    with context():
        resumed.step()
        return [*copy_of(model), *copy_of(twin), *(value.clone() for value in tensors_of(resumed.state_dict()))]


def take_gradients_in(model, step, dtype):
    """``take_gradients``, for a model in any dtype."""
    exact = small_model()
    take_gradients(exact, step)
    for parameter, other in zip(model.parameters(), exact.parameters(), strict=True):
        parameter.grad = other.grad.to(dtype)


@EVERY
@FOREIGN
def test_defaults_change_no_bit_of_a_step_or_of_a_resumed_one(name, foreign):
    assert_equal(trained(name, lambda: defaults(**DEFAULTS[foreign])), trained(name, defaults))


@EVERY
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_defaults_change_no_bit_in_any_dtype_of_weights_and_moments(name, dtype, state_dtype):
    options = {"dtype": dtype, "state_dtype": state_dtype}
    found = trained(name, lambda: defaults(torch.float64, "meta"), **options)
    assert_equal(found, trained(name, defaults, **options))


def simulated(method, options, run_step):
    """Steps of a matrix over three simulated ranks; its weights and all states in the end."""
    torch.manual_seed(0)
    shape = of(method).shapes[0]
    gradients = [of(method).gradients_for(shape)(step) for step in range(STEPS)]
    start = of(method).start(shape)
    options = {"lr": 1e-2, "eps": 0.1, **options}
    matrix = run_step(lambda: ShardedMatrix(method, start, even_parts(shape, 3), **options))
    for gradient in gradients:
        run_step(lambda gradient=gradient: matrix.step(gradient))
    return [matrix.weight, *(v for state in matrix.states for v in state.values() if torch.is_tensor(v))]


@pytest.mark.parametrize(("method", "options"), cases(), ids=str)
def test_nothing_in_a_step_follows_the_defaults_with_any_option(method, options):
    found = simulated(method, options, under_foreign_defaults)
    assert_equal(found, simulated(method, options, lambda compute: compute()))


@EVERY
@pytest.mark.parametrize("state_dtype", ["bf16", "int8"])
def test_nothing_follows_the_defaults_in_quantized_moments(name, state_dtype):
    options = of(name).cases[0] | {"state_dtype": state_dtype}
    assert_equal(simulated(name, options, under_foreign_defaults), simulated(name, options, lambda compute: compute()))


@FOREIGN
@pytest.mark.parametrize("options", PROBES, ids=str)
def test_defaults_change_no_bit_of_a_perturbation(options, foreign):
    assert_equal(perturbed(lambda: defaults(**DEFAULTS[foreign]), options), perturbed(defaults, options))


def adapted(context, axis, dtype=torch.float32):
    """Add adapters, train them, merge them; the weights before and after."""
    model = small_model().to(dtype)
    with context():
        add_adapters(model, adapter_rank=3, norm_axis=axis, target_modules=["0"])
    start = copy_of(model)
    options = {"parametrization": "adapter", "rank": 2, "lr": 1e-2}
    optimizer = ds_lowrank.GradNormLoRP(model, **options)
    for step in range(2):
        inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).to(dtype)
        model.zero_grad()
        with context():
            forward_backward(optimizer, lambda inputs=inputs: model(inputs).float().square().mean())
            optimizer.step()
    with context():
        merge_adapters(model)
    return [*start, *copy_of(model)]


@FOREIGN
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_defaults_change_no_bit_of_adapters(axis, dtype, foreign):
    assert_equal(adapted(lambda: defaults(**DEFAULTS[foreign]), axis, dtype), adapted(defaults, axis, dtype))
