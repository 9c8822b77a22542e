"""Equality with galore-torch, the official GaLore, on one process."""

import importlib
import sys
import types

import pytest
import torch

import ds_lowrank


@pytest.fixture
def official(monkeypatch):
    """galore-torch's GaLoreAdamW. It imports bitsandbytes for a variant that is not used here."""
    stub = types.ModuleType("bitsandbytes")
    optim = types.ModuleType("bitsandbytes.optim")
    base = types.ModuleType("bitsandbytes.optim.optimizer")
    base.Optimizer2State = object
    for name, module in {
        "bitsandbytes": stub, "bitsandbytes.optim": optim, "bitsandbytes.optim.optimizer": base
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    return importlib.import_module("galore_torch").GaLoreAdamW


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32)])
def test_twelve_steps_and_three_refreshes_equal_the_official_code(official, shape, proj_type):
    """The official epsilon stands outside the uncorrected root, so both run with one that does not matter (1e-12)."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.randn(shape)) for _ in range(2))
    theirs.data.copy_(ours.data)
    settings = {"rank": 6, "update_proj_gap": 5, "scale": 0.25, "proj_type": proj_type}
    mine = ds_lowrank.GaLore([("w", ours)], lr=1e-2, eps=1e-12, projector="svd", **settings)
    peer = official([{"params": [theirs], **settings}], lr=1e-2, eps=1e-12, no_deprecation_warning=True)
    for step in range(12):
        torch.manual_seed(100 + step)
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        peer.step()
        assert (ours - theirs).norm() < 1e-4 * theirs.norm(), step


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
