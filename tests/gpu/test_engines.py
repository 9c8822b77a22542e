"""DeepSpeed engines on a card: fp16, which DeepSpeed refuses on a CPU, and NCCL."""

from __future__ import annotations

import functools
import traceback
from itertools import product

import pytest
import torch

import ds_lowrank
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, config, full_weights, make_model, max_relative_difference, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STAGES = (1, 2, 3)
STEPS = 30


def train_fp16(settings):
    """Train in fp16 from a scale at which the first steps overflow and are skipped."""
    engine, *_ = ds_lowrank.initialize(model=make_model().cuda(), config=settings)
    for step in range(STEPS):
        train_step(engine, step, device="cuda")
    optimizer = engine.basic_optimizer
    done = {slot.state["step"] for slot in optimizer.slots}
    finite = all(t.isfinite().all() for s in optimizer.slots for t in s.state.values() if isinstance(t, torch.Tensor))
    finite = finite and all(weight.isfinite().all() for weight in full_weights(engine).values())
    return {"skipped": engine.skipped_steps, "done": done, "finite": bool(finite)}


def train_all():
    """Train every method at every stage in one process, which takes longer to start than to train one of them."""
    found = {}
    for method, stage in product(sorted(METHODS), STAGES):
        settings = config(stage, 1, method=method, fp16={"enabled": True, "initial_scale_power": 32})
        try:
            found[method, stage] = train_fp16(settings)
        except Exception:
            found[method, stage] = traceback.format_exc()
    return found


@functools.cache
def trained():
    """Return the result or the traceback of each method and stage."""
    try:
        (found,) = run_ranks(1, train_all, device="cuda", timeout=300)
    except AssertionError as error:  # kept, so that one failed start is not repeated by every test
        found = dict.fromkeys(product(METHODS, STAGES), str(error))
    return found


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("stage", STAGES)
def test_fp16_skips_overflowing_steps_and_trains(stage, method):
    result = trained()[method, stage]
    assert isinstance(result, dict), result
    assert result["skipped"] > 0
    assert result["done"] == {STEPS - result["skipped"]}
    assert result["finite"]


def weights_after_steps(settings):
    """The weights after two steps of an engine on the card, and where its optimizer has its own."""
    engine, *_ = ds_lowrank.initialize(model=make_model().cuda(), config=settings)
    for step in range(2):
        train_step(engine, step, device="cuda")
    places = {str(t.device) for s in engine.basic_optimizer.slots for t in (s.fragment.store, *tensors_of(s))}
    return {name: weight.cpu() for name, weight in full_weights(engine).items()}, places


def tensors_of(slot):
    return [value for value in slot.state.values() if isinstance(value, torch.Tensor)]


def offloaded_and_not():
    """Every method at every stage with the optimizer on the CPU, and on the card."""
    found = {}
    for method, stage in product(sorted(METHODS), STAGES):
        for device in ("none", "cpu"):
            zero = {"offload_optimizer": {"device": device}}
            settings = config(stage, 1, gas=2, clip=0.5, method=method, zero_optimization=zero)
            try:
                found[method, stage, device] = weights_after_steps(settings)
            except Exception:
                found[method, stage, device] = traceback.format_exc()
    return found


@functools.cache
def stepped():
    """Return the weights or the traceback of each method, stage and device."""
    try:
        (found,) = run_ranks(1, offloaded_and_not, device="cuda", timeout=300)
    except AssertionError as error:
        found = dict.fromkeys(product(METHODS, STAGES, ("none", "cpu")), str(error))
    return found


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_on_the_cpu_is_the_one_on_the_card(stage, method):
    """Two devices sum in other orders; the engine's own bound after one step is 1e-5, and this is two."""
    results = [stepped()[method, stage, device] for device in ("none", "cpu")]
    assert all(isinstance(result, tuple) for result in results), results
    (card, own), (host, places) = results
    assert own == {"cuda:0"}
    assert places == {"cpu"}
    assert max_relative_difference(host, card) < 1e-4
