"""Equality with the official codes that are packages, galore-torch and apollo-torch, and with peft's DoRA."""

import importlib
import sys
import types
from importlib.util import find_spec

import pytest
import torch

import ds_lowrank
from ds_lowrank.adapters.model import AdapterLinear
from ds_lowrank.reference.sketch import sketch


@pytest.fixture
def imported(monkeypatch):
    """Imports an official package. Both import bitsandbytes, for variants that are not used here."""
    stub = types.ModuleType("bitsandbytes")
    optim = types.ModuleType("bitsandbytes.optim")
    base = types.ModuleType("bitsandbytes.optim.optimizer")
    functional = types.ModuleType("bitsandbytes.functional")
    base.Optimizer2State, stub.functional = object, functional
    for name, module in {
        "bitsandbytes": stub,
        "bitsandbytes.optim": optim,
        "bitsandbytes.optim.optimizer": base,
        "bitsandbytes.functional": functional,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return importlib.import_module


PUBLISHED = {"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.1}
AS_PUBLISHED = {"eps_root": "uncorrected", "weight_decay_order": "after"}


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32)])
def test_twelve_steps_and_three_refreshes_equal_the_official_code(imported, shape, proj_type):
    """With its epsilon of 1e-6 beside the uncorrected root, and decay after the update."""
    torch.manual_seed(0)
    start = 0.02 * torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"rank": 6, "update_proj_gap": 5, "scale": 0.25, "proj_type": proj_type}
    mine = ds_lowrank.GaLore([("w", ours)], projector="svd", **PUBLISHED, **AS_PUBLISHED, **settings)
    official = imported("galore_torch").GaLoreAdamW
    peer = official([{"params": [theirs], **settings}], no_deprecation_warning=True, **PUBLISHED)
    for step in range(12):
        torch.manual_seed(100 + step)
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        peer.step()
        assert (ours - theirs).norm() < 1e-5 * (theirs - start).norm(), step


@pytest.mark.parametrize("limit", [1.01, None])
@pytest.mark.parametrize("kind", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32)])
def test_apollo_equals_the_official_code(imported, monkeypatch, shape, kind, limit):
    """Twenty steps, five projections, with this package's random numbers. Their scale is the square of ours."""
    if find_spec("apollo_torch") is None:
        pytest.skip("apollo-torch is not installed")
    package = imported("apollo_torch")
    projector = importlib.import_module("apollo_torch.random_projector")
    rank = 4 if kind == "channel" else 1

    def drawn(size, seed, **_):
        matrix = sketch(0, "w", seed - 1, max(size), rank)  # the first parameter has seed 1
        return matrix.T if size[0] == rank else matrix

    monkeypatch.setattr(projector, "stable_randn", drawn)
    monkeypatch.setattr(projector, "next_seed", lambda seed: seed + 1)
    torch.manual_seed(0)
    start = 0.02 * torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    common = {"rank": rank, "update_proj_gap": 4}
    mine = ds_lowrank.Apollo(
        [("w", ours)], mini=kind == "tensor", scale=2.0, norm_growth_limit=limit, ratio_moments="uncorrected",
        **PUBLISHED, **AS_PUBLISHED, **common,
    )  # fmt: skip
    group = {"params": [theirs], "scale": 4.0, "proj": "random", "proj_type": "std", "scale_type": kind, **common}
    peer = package.APOLLOAdamW([group], disable_nl=limit is None, **PUBLISHED)
    for step in range(20):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        peer.step()
        assert (ours - theirs).norm() < 1e-5 * (theirs - start).norm(), step


def test_an_adapter_computes_what_dora_of_peft_computes():
    """In the middle of training. peft's gradients are others: it takes the norm for a constant."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    linear, inputs = torch.nn.Linear(20, 12), torch.randn(7, 20)
    mine = AdapterLinear(linear, "layer", rank=4, alpha=16)
    with torch.no_grad():
        mine.lora_B.normal_()
        mine.magnitude.uniform_(0.5, 2)
    twin = torch.nn.Linear(20, 12)
    twin.load_state_dict(linear.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=16, use_dora=True, target_modules=["0"])
    dora = peft.inject_adapter_in_model(config, torch.nn.Sequential(twin))[0]
    with torch.no_grad():
        dora.lora_A["default"].weight.copy_(mine.lora_A)
        dora.lora_B["default"].weight.copy_(mine.lora_B)
        dora.lora_magnitude_vector["default"].weight.copy_(mine.magnitude)
    expected = dora(inputs)
    assert (mine(inputs) - expected).norm() < 1e-6 * expected.norm()


def test_the_unprojected_parameters_equal_torch_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.randn(50)) for _ in range(2))
    theirs.data.copy_(ours.data)
    mine = ds_lowrank.GaLore([("norm", ours), ("w", torch.nn.Parameter(torch.ones(2, 2)))], lr=1e-2, weight_decay=0.1)
    peer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        ours.grad = torch.randn(50)
        theirs.grad = ours.grad.clone()
        mine.step()
        peer.step()
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
