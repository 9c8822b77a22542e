"""NVIDIA's apex: whether it is there, and its fused AdamW.

It is on PyPI under no name. What PyPI calls ``apex`` is a toolkit for the web framework Pyramid; megatron-core, whose
feature detection is a bare ``import apex``, takes that for NVIDIA's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ds_lowrank.environment.packages import one_line, version_of
from ds_lowrank.errors import ConfigError

UNINSTALL = "pip uninstall apex"
DECOUPLED = 1
"""The kernel's mode in which decay does not pass through the moments."""


@dataclass(frozen=True)
class Apex:
    """What goes by the name of apex here.

    Attributes:
        status: ``usable``; ``uncompiled`` is NVIDIA's without a working ``amp_C``, which holds its kernels;
            ``broken`` is NVIDIA's where the package itself does not import; ``impostor`` is something else.
        version: as its metadata says; empty where it has none.
        location: the folder or file; empty where there is none.
        reason: the error on importing, of ``uncompiled`` and ``broken``.
    """

    status: Literal["usable", "uncompiled", "broken", "impostor", "missing"]
    version: str = ""
    location: str = ""
    reason: str = ""


@functools.cache
def find_apex() -> Apex:
    """Look once. Nothing is imported that cannot be NVIDIA's: an impostor's code does not run."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Apex("missing")
    folders = list(spec.submodule_search_locations or ())
    location = folders[0] if folders else str(spec.origin)
    version = version_of("apex")
    if not any(Path(folder, "optimizers").is_dir() for folder in folders):
        return Apex("impostor", version, location)
    try:
        optimizers = getattr(importlib.import_module("apex"), "optimizers", None)
    except Exception as error:  # built for another torch, it fails in many ways
        return Apex("broken", version, location, one_line(error))
    if not hasattr(optimizers, "FusedAdam"):
        return Apex("impostor", version, location)
    try:
        importlib.import_module("amp_C").multi_tensor_adam  # noqa: B018
    except Exception as error:
        return Apex("uncompiled", version, location, one_line(error))
    return Apex("usable", version, location)


def check_apex() -> None:
    """Refuse an apex that is not NVIDIA's, before megatron-core takes it for that.

    Raises:
        ConfigError: says where it lies and how to get rid of it.
    """
    apex = find_apex()
    if apex.status == "impostor":
        raise ConfigError(
            f"{apex.location} is not NVIDIA's apex but megatron-core would take it for that: run `{UNINSTALL}`, or "
            "where it was not installed remove or rename it"
        )


def adamw_by(device: torch.device) -> Literal["apex", "torch"]:
    """Whose fused AdamW steps fp32 tensors on a device: apex's kernel, which is for CUDA only, where it is usable."""
    return "apex" if device.type == "cuda" and find_apex().status == "usable" else "torch"


def apex_adamw(
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    steps: list[int],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """What ``fused_adamw`` of ``linalg/moments.py`` does, by apex's kernel.

    It takes its coefficients in fp32, and torch takes them in fp64. With beta2 = 0.999 its second moment is smaller by
    1.3e-5 of itself; so is the correction of the bias that the moment is divided by, and the direction is the same.

    Args:
        weights: contiguous, none empty, all on one device.
        steps: how many each tensor has done before.
    """
    applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    kernel = importlib.import_module("amp_C").multi_tensor_adam
    overflow = torch.zeros(1, dtype=torch.int32, device=weights[0].device)  # asked for, and not read by this kernel
    for done in sorted(set(steps)):  # a launch has one count for all its tensors
        alike = [i for i, step in enumerate(steps) if step == done]
        lists = [[tensors[i] for i in alike] for tensors in (gradients, weights, exp_avgs, exp_avg_sqs)]
        correct_bias = 1
        applier(kernel, overflow, lists, lr, *betas, eps, done + 1, DECOUPLED, correct_bias, weight_decay)
