"""DeepSpeed engines on a card: fp16, which DeepSpeed refuses on a CPU, and NCCL."""

from __future__ import annotations

import functools
import traceback
from itertools import product

import pytest
import torch

import ds_lowrank
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, config, full_weights, make_model, train_step

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
