"""Optimizer steps on a card, without DeepSpeed, against the same steps on the CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.agreement import BOUNDS, exact_products, largest_difference, train
from benchmarks.gpu.cases import method_options, tagged
from ds_lowrank.environment.apex import apex_adamw, find_apex
from ds_lowrank.linalg.moments import fused_adamw
from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.registry import OPTIMIZERS
from tests.foreign import defaults

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EVERY = pytest.mark.parametrize("method", sorted(METHODS))


@pytest.fixture(autouse=True)
def without_tf32():
    with exact_products():
        yield


@EVERY
@pytest.mark.parametrize("state_dtype", sorted(BOUNDS))
def test_steps_on_the_device_equal_those_on_the_cpu(method, state_dtype):
    on_cpu, on_cuda = (train(method, state_dtype, device, seed=1) for device in (CPU, CUDA))
    assert largest_difference(on_cuda, on_cpu) <= BOUNDS[state_dtype]


@EVERY
def test_moments_are_stored_on_the_device(method):
    weight = torch.nn.Parameter(torch.randn(64, 48, device=CUDA))
    optimizer = OPTIMIZERS[method]([("w", weight)], **method_options(method, 8, 4, state_dtype="int8"))
    optimizer.bind()
    tensors = [value for value in optimizer.slots[0].state.values() if isinstance(value, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    assert torch.uint8 in {tensor.dtype for tensor in tensors}


@EVERY
def test_a_layer_built_on_the_default_device_is_stepped_there(method):
    with defaults(torch.bfloat16, "cuda"):
        layer = torch.nn.Linear(48, 64, bias=False)
        options = method_options(method, 8, 4, perturbation_radius=0.0)
        optimizer = OPTIMIZERS[method](layer, lr=1e-2, **options)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.is_cuda
    assert layer.weight.isfinite().all()
    assert not layer.weight.equal(before)


@EVERY
@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.float32), ("cpu", torch.bfloat16)])
def test_torchs_defaults_do_not_change_a_step(method, device, dtype):
    plain = train(method, "fp32", CUDA, seed=1)
    with defaults(dtype, device):
        foreign = train(method, "fp32", CUDA, seed=1)
    assert largest_difference(foreign, plain) == 0


def test_vectors_are_stepped_as_by_torchs_fused_adamw():
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = (
        torch.nn.Parameter(torch.randn(1000, device=CUDA, generator=torch.Generator(CUDA).manual_seed(0)))
        for _ in range(2)
    )
    projected = torch.nn.Parameter(torch.zeros(8, 8, device=CUDA))
    named = [("model.norm.weight", ours), ("model.layers.0.self_attn.q_proj.weight", projected)]
    optimizers = (
        OPTIMIZERS["GaLore"](tagged(dict(named)), rank=4, **options),
        torch.optim.AdamW([theirs], fused=True, **options),
    )
    for _ in range(3):
        ours.grad, projected.grad = torch.randn(1000, device=CUDA), torch.randn(8, 8, device=CUDA)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.skipif(find_apex().status != "usable", reason="no apex with its kernels")
def test_apexs_adamw_is_torchs():
    """The coefficients are numbers that fp32 represents exactly."""
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
