"""LORENZA's ascent in one process: the slopes that probes measure, the perturbed weights, and their restoration."""

from __future__ import annotations

import logging

import pytest
import torch

import ds_lowrank
from ds_lowrank.integration.forward_backward import forward_backward
from ds_lowrank.integration.probe import RandomState
from ds_lowrank.methods.blocks import ascent
from ds_lowrank.reference.lorenza import DenseLorenza, climb

FORMS = [
    {"rank": 3},
    {"rank": 3, "probe_form": "gaussian"},
    {"rank": 3, "proj_type": "reverse_std"},
    {"rank": None},
]


def quadratic(shape, seed=0):
    """f(W) = <A W, W> / 2 + <B, W>, and its gradient."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(shape[0], shape[0], generator=generator)
    a, b = a @ a.T / shape[0], torch.randn(shape, generator=generator)
    return (lambda w: (a @ w * w).sum() / 2 + (b * w).sum()), (lambda w: a @ w + b)


def optimizer_after_a_step(shape=(12, 9), dtype=torch.float32, **options):
    """An optimizer of one matrix that has taken a first step, and therefore has a subspace."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = ds_lowrank.Lorenza([("w", weight)], **{"lr": 1e-2, "rank": 3, **options})
    loss, _ = quadratic(shape)
    forward_backward(optimizer, lambda: loss(weight.float()))
    optimizer.step()
    optimizer.zero_grad()
    return optimizer, weight, loss


def ascend_and_measure(optimizer, loss, weight):
    """Move the weights along the perturbation, and return the slopes that it measured."""
    found, measured = [], ascent.slopes

    def recorded(*arguments):
        found.extend(measured(*arguments))
        return found

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(ascent, "slopes", recorded)
        optimizer.perturbation.ascend(lambda: loss(weight.double()).item(), optimizer.options)
    return found


def dense_twin(optimizer, weight, **options):
    """The dense reference after the same first step.

    Without a rank that step is perturbed already; there its directions do not depend on it, and it is left out.
    """
    torch.manual_seed(0)
    twin = DenseLorenza(torch.randn(weight.shape), **{"lr": 1e-2, "rank": 3, **options})
    if twin.rank is not None:
        twin.step(quadratic(tuple(weight.shape))[1](twin.weight))
        assert (twin.weight - weight).abs().max() < 1e-5
    return twin


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("radius", [1e-2, 1.0, 30.0])
def test_two_sided_slopes_are_exact_on_a_quadratic(form, radius):
    """A quadratic's odd part is linear, so the radius does not matter.

    The weights are fp32: a step of 1e-2 on weights of about one keeps five digits.
    """
    options = {"probes": 3, "probe_radius": radius, **form}
    optimizer, weight, _ = optimizer_after_a_step(**options)
    start = weight.detach().clone()
    twin = dense_twin(optimizer, weight, **form)
    slopes = ascend_and_measure(optimizer, quadratic_in_double(), weight)
    gradient = quadratic(tuple(weight.shape))[1](start)
    expected = [(gradient * twin.direction(f"1 probe 0.{j}")).sum().item() for j in range(3)]
    assert slopes == pytest.approx(expected, rel=1e-4, abs=1e-4)


def quadratic_in_double(shape=(12, 9)):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(shape[0], shape[0], generator=generator)
    a, b = a @ a.T / shape[0], torch.randn(shape, generator=generator)
    a, b = a.double(), b.double()
    return lambda w: (a @ w * w).sum() / 2 + (b * w).sum()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_sided_slopes_err_in_the_first_order_of_the_radius(form):
    """By mu / 2 <A Pi, Pi>: ten times the radius, ten times the error."""
    errors = []
    for radius in (0.1, 1.0):
        optimizer, weight, _ = optimizer_after_a_step(probe_radius=radius, two_sided=False, **form)
        start, twin = weight.detach().clone(), dense_twin(None, optimizer_after_a_step(**form)[1], **form)
        (slope,) = ascend_and_measure(optimizer, quadratic_in_double(), weight)
        direction = twin.direction("1 probe 0.0")
        errors.append(slope - (quadratic((12, 9))[1](start) * direction).sum().item())
    assert errors[1] == pytest.approx(10 * errors[0], rel=1e-2)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("norm", ["global", "per_matrix"])
def test_the_ascent_moves_the_weights_as_the_dense_reference(form, norm):
    options = {"probes": 2, "probe_radius": 0.1, "perturbation_radius": 0.7, "norm": norm, **form}
    shapes = {"a": (12, 9), "b": (9, 14)}
    torch.manual_seed(0)
    weights = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    twins = [DenseLorenza(w.detach().clone(), name=name, **options) for name, w in weights.items()]
    optimizer = ds_lowrank.Lorenza(list(weights.items()), lr=1e-2, **options)
    losses = {name: quadratic(shape) for name, shape in shapes.items()}

    def loss():
        return sum(losses[name][0](w) for name, w in weights.items())

    forward_backward(optimizer, loss)
    if form["rank"] is not None:  # otherwise the first gradient is taken elsewhere already
        for twin, (name, _) in zip(twins, weights.items(), strict=True):
            twin.step(losses[name][1](twin.weight))
        optimizer.step()
    with torch.no_grad():
        optimizer.perturbation.ascend(lambda: loss().item(), optimizer.options)
    climb(twins, lambda: sum(losses[t.name][0](t.weight) for t in twins), 0 if form["rank"] is None else 1, **options)
    for twin, weight in zip(twins, weights.values(), strict=True):
        assert (weight - twin.weight).norm() < 1e-4 * options["perturbation_radius"]
    assert optimizer.perturbation.norm == pytest.approx(0.7 * (2**0.5 if norm == "per_matrix" else 1.0), rel=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_ascent_raises_the_loss_of_a_quadratic(form):
    """It does so on every quadratic, because the two-sided slope is the gradient's component along the probe."""
    for seed in range(10):
        optimizer, weight, loss = optimizer_after_a_step(perturbation_radius=1e-2, seed=seed, **form)
        before = loss(weight).item()
        with torch.no_grad():
            optimizer.perturbation.ascend(lambda loss=loss, weight=weight: loss(weight).item(), optimizer.options)
        assert loss(weight).item() > before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_learning_rate_of_zero_restores_every_bit(form, dtype):
    optimizer, weight, loss = optimizer_after_a_step(dtype=dtype, lr=0.0, perturbation_radius=2.0, probes=2, **form)
    before, found = weight.detach().clone(), []

    def forward():
        found.append(weight.detach().clone())
        return loss(weight.float())

    for _ in range(3):
        forward_backward(optimizer, forward)
        assert torch.equal(weight, before)
        optimizer.step()
    assert torch.equal(weight, before)
    assert len(found) == 3 * 5
    assert all(not torch.equal(other, before) for other in found)


def test_the_gradient_is_taken_at_the_moved_weights():
    optimizer, weight, loss = optimizer_after_a_step(perturbation_radius=2.0)
    found = []
    forward_backward(optimizer, lambda: found.append(weight.detach().clone()) or loss(weight))
    assert (weight.grad - quadratic((12, 9))[1](found[-1])).norm() < 1e-5 * weight.grad.norm()
    assert (found[-1] - weight).norm().item() == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_forward_pass_that_raises_restores_the_weights(failing):
    """The third pass is the one for the gradient."""
    optimizer, weight, loss = optimizer_after_a_step(perturbation_radius=2.0)
    before, calls = weight.detach().clone(), []

    def forward():
        calls.append(1)
        if len(calls) == failing:
            raise ZeroDivisionError("no batch")
        return loss(weight)

    with pytest.raises(ZeroDivisionError, match="no batch"):
        forward_backward(optimizer, forward)
    assert torch.equal(weight, before)
    with pytest.raises(RuntimeError, match=r"call ds_lowrank\.forward_backward"):
        weight.grad = torch.ones_like(weight)
        optimizer.step()


def test_a_step_without_the_ascent_is_refused():
    weight = torch.nn.Parameter(torch.randn(12, 9))
    optimizer = ds_lowrank.Lorenza([("w", weight)], rank=3)
    weight.square().sum().backward()
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="perturbation_radius to 0"):
        optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_an_ascent_without_a_slope_keeps_the_weights_and_is_counted(bad):
    optimizer, weight, loss = optimizer_after_a_step()
    found = []

    def forward():
        found.append(weight.detach().clone())
        return loss(weight) if torch.is_grad_enabled() else weight.sum() * 0 + bad

    before = weight.detach().clone()
    forward_backward(optimizer, forward)
    assert torch.equal(found[-1], before)
    metrics = optimizer.metrics()
    assert (metrics["lowrank/failed_ascents"], metrics["lowrank/perturbation_norm"]) == (1, 0.0)


def test_probes_run_without_grad_and_drop_the_same_elements():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 12), torch.nn.Dropout(0.5), torch.nn.Linear(12, 4))
    optimizer = ds_lowrank.Lorenza(model, rank=None, probes=2)
    masks, grad = [], []
    model[1].register_forward_hook(lambda module, args, output: masks.append(output == 0))

    def forward():
        grad.append(torch.is_grad_enabled())
        return model(torch.ones(5, 9)).square().mean()

    start = torch.get_rng_state()
    forward_backward(optimizer, [forward, forward])
    assert grad == [False] * 8 + [True] * 2
    pairs = [masks[i : i + 2] for i in range(0, len(masks), 2)]
    assert all(torch.equal(a, b) for pair in pairs for a, b in zip(pair, pairs[0], strict=True))
    assert not torch.equal(*pairs[0])
    # The random state has advanced as if the model had run once on each micro-batch.
    after = torch.rand(3)
    torch.set_rng_state(start)
    for _ in range(2):
        model(torch.ones(5, 9))
    assert torch.equal(torch.rand(3), after)


def test_each_micro_batch_can_have_its_own_perturbation():
    optimizer, weight, loss = optimizer_after_a_step(accumulation="per_micro_batch", perturbation_radius=2.0)
    found = []

    def forward():
        if torch.is_grad_enabled():
            found.append(weight.detach().clone())
        return loss(weight)

    forward_backward(optimizer, [forward, forward])
    gradients = [quadratic((12, 9))[1](at) for at in found]
    assert not torch.equal(*found)
    assert (weight.grad - sum(gradients) / 2).norm() < 1e-5 * weight.grad.norm()


def test_a_perturbation_lost_to_bf16_rounding_is_warned_of_once(caplog):
    optimizer, weight, loss = optimizer_after_a_step(
        dtype=torch.bfloat16, probe_radius=1e-6, perturbation_radius=1e-4, master_weights=False
    )
    with caplog.at_level(logging.WARNING, logger="ds_lowrank"):
        for _ in range(2):
            forward_backward(optimizer, lambda: loss(weight.float()))
            optimizer.step()
    messages = [record.getMessage() for record in caplog.records]
    # A probe that moves nothing finds no slope, so the weights are not perturbed.
    assert len(messages) == 1
    assert "Raise probe_radius" in messages[0] and "lost to rounding" in messages[0]


def test_one_sided_probes_with_dropout_are_warned_of_once(caplog):
    model = torch.nn.Sequential(torch.nn.Linear(9, 12), torch.nn.Dropout(0.5))
    engine = ds_lowrank.Lorenza(model, rank=None, two_sided=False)
    engine.module = model
    with caplog.at_level(logging.WARNING, logger="ds_lowrank"):
        for _ in range(2):
            forward_backward(engine, lambda: model(torch.ones(5, 9)).square().mean())
    assert [record.getMessage().count("dropout") > 0 for record in caplog.records] == [True]


def test_groups_that_disagree_on_the_ascent_are_refused():
    first, second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 5)
    ds_lowrank.tag_parameters(torch.nn.ModuleDict({"a": first, "b": second}))
    groups = [{"params": first.parameters()}, {"params": second.parameters(), "probes": 2}]
    with pytest.raises(ds_lowrank.ConfigError, match="must agree on probes"):
        ds_lowrank.Lorenza(groups, rank=2).bind()


def test_megatron_cores_random_states_are_rewound():
    """On a GPU its dropout layers use them; here they are any tensors."""
    random = pytest.importorskip("megatron.core.tensor_parallel.random")
    tracker = random.get_cuda_rng_tracker()
    RandomState().rewind()
    assert not tracker.is_initialized(), "nothing has seeded them"
    tracker.set_states({"model-parallel-rng": torch.tensor([1])})
    try:
        state = RandomState()
        tracker.set_states({"model-parallel-rng": torch.tensor([2])})
        state.rewind()
        assert tracker.get_states() == {"model-parallel-rng": torch.tensor([1])}
    finally:
        tracker.reset()
