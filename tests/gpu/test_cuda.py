"""What needs a CUDA device: fp16 (DeepSpeed refuses it on a CPU), NCCL, and the same update as on the CPU."""

from __future__ import annotations

import pytest
import torch

import ds_lowrank
from ds_lowrank.environment.apex import apex_adamw, find_apex
from ds_lowrank.linalg.moments import fused_adamw
from ds_lowrank.optimizer.registry import OPTIMIZERS
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, config, full_weights, make_model, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


EVERY = pytest.mark.parametrize("method", sorted(METHODS))


@EVERY
def test_one_step_on_the_device_equals_the_cpu(method):
    """Same sketch (drawn on the CPU), products without TF32 (torch's default): only the order of sums differs."""
    weights = []
    options = METHODS[method] | {"lr": 1e-2}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(100, 60).to(device))
        gradient = torch.randn(100, 60).to(device)
        optimizer = OPTIMIZERS[method]([("w", weight)], **options)
        weight.grad = gradient
        optimizer.step()
        weights.append(weight.detach().cpu())
    assert (weights[0] - weights[1]).norm() < 1e-5 * weights[0].norm()


def train_fp16(settings, steps):
    """fp16 at the default scale: the first steps overflow, are skipped, and leave no trace in the state."""
    engine, *_ = ds_lowrank.initialize(model=make_model().cuda(), config=settings)
    for step in range(steps):
        train_step(engine, step, device="cuda")
    optimizer = engine.basic_optimizer
    done = {slot.state["step"] for slot in optimizer.slots}
    finite = all(t.isfinite().all() for s in optimizer.slots for t in s.state.values() if isinstance(t, torch.Tensor))
    return {"skipped": engine.skipped_steps, "done": done, "finite": bool(finite), "weights": full_weights(engine)}


@EVERY
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_skips_overflowing_steps_and_trains(stage, method):
    settings = config(stage, 1, method=method, fp16={"enabled": True, "initial_scale_power": 32})
    (result,) = run_ranks(1, train_fp16, settings, 30, device="cuda", timeout=300)
    assert result["skipped"] > 0
    assert result["done"] == {30 - result["skipped"]}
    assert result["finite"]


@pytest.mark.skipif(find_apex().status != "usable", reason="no apex with its kernels")
def test_apexs_adamw_is_torchs():
    """With coefficients that fp32 holds exactly; the stand-in of the unit tests is held to the same."""
    torch.manual_seed(0)
    steps = [0, 3, 0]
    drawn = [[torch.rand(1000 + i, device="cuda") for i in steps] for _ in range(4)]
    results = []
    for kernel in (apex_adamw, fused_adamw):
        lists = [[tensor.clone() for tensor in tensors] for tensors in drawn]
        kernel(*lists, steps, 2.0**-7, (0.875, 1 - 2.0**-10), 2.0**-27, 2.0**-5)
        results.append(lists)
    for ours, theirs in zip(*results, strict=True):
        ours, theirs = torch.cat(ours), torch.cat(theirs)
        assert (ours - theirs).norm() <= 1e-7 * theirs.norm()
