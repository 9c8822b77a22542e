"""Projected accumulation, weights without masters and offload on a card."""

from __future__ import annotations

import functools
import traceback

import pytest
import torch

import ds_lowrank
from benchmarks.gpu.agreement import BOUNDS, exact_products
from benchmarks.gpu.cases import method_options
from ds_lowrank.optimizer.registry import OPTIMIZERS
from tests.engines.pool import run_ranks
from tests.engines.scenario import config, full_weights, make_model, max_relative_difference, tokens, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EXACT = ["AdaRankGrad", "GaLore", "GradNormLoRP", "Lorenza", "VLoRP"]
STAGES = (1, 2, 3)


@pytest.fixture(autouse=True)
def without_tf32():
    with exact_products():
        yield


def train(method, device, reduction):
    """Seven steps of two micro-batches on two layers; refreshes, where there are any, at steps 0, 3 and 6."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 128), torch.nn.Tanh(), torch.nn.Linear(128, 48)).to(device)
    options = method_options(method, 8, 3, perturbation_radius=0.0)
    optimizer = OPTIMIZERS[method](model, lr=1e-2, reduction=reduction, **options)
    optimizer.bind()
    generator = torch.Generator().manual_seed(1)
    for _ in range(7):
        for _ in range(2):
            x = torch.randn(32, 48, generator=generator, device="cpu", dtype=torch.float32).to(device)
            (model(x) - x.roll(1, 0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("method", EXACT)
def test_projections_accumulated_on_a_card_are_whole_gradients_on_the_cpu(method):
    assert max_relative_difference(train(method, CUDA, "projected"), train(method, CPU, "gradient")) < BOUNDS["fp32"]


def weights_of(settings, steps=4):
    torch.backends.cuda.matmul.allow_tf32 = False
    engine, *_ = ds_lowrank.initialize(model=make_model().cuda(), config=settings)
    losses = []
    for _ in range(steps):
        train_step(engine, 0, device="cuda")  # the same batch
        batch = tokens(0).to("cuda")
        losses.append(float(engine(input_ids=batch, labels=batch).loss))
    return {name: weight.cpu() for name, weight in full_weights(engine).items()}, losses


def run_all():
    """Engines of one process, which takes longer to start than to train one of them."""
    cases = {("projected", 0): config(0, 1, "bf16", gas=2, params={"reduction": "projected", "master_weights": False})}
    for stage in STAGES:
        cases["plain", stage] = config(stage, 1, gas=2)
        offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}
        cases["offload", stage] = config(stage, 1, gas=2, **offload)
    found = {}
    for key, settings in cases.items():
        try:
            found[key] = weights_of(settings)
        except Exception:
            found[key] = traceback.format_exc()
    return found


@functools.cache
def trained():
    """Return the result or the traceback of each case."""
    try:
        (found,) = run_ranks(1, run_all, device="cuda", timeout=200)
    except AssertionError as error:  # kept, so that one failed start is not repeated by every test
        return str(error)
    return found


def result_of(key):
    found = trained()
    result = found if isinstance(found, str) else found[key]
    assert not isinstance(result, str), result
    return result


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_on_the_cpu_is_that_on_the_card(stage):
    """To the order of fp32 sums, through four steps of Adam."""
    assert max_relative_difference(result_of(("offload", stage))[0], result_of(("plain", stage))[0]) < 1e-4


def test_an_engine_without_masters_learns_by_projected_reduction():
    weights, losses = result_of(("projected", 0))
    assert losses[-1] < losses[0]
    assert all(weight.isfinite().all() for weight in weights.values())
