"""NVIDIA's apex: whether it is installed, and its fused AdamW kernel.

It is not published on PyPI. The package called ``apex`` there is a toolkit for the web framework Pyramid, which
megatron-core mistakes for NVIDIA's, as it detects apex by a bare ``import apex``.
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
"""The kernel's mode for decoupled weight decay, which does not enter the moments."""


@dataclass(frozen=True)
class Apex:
    """The package that ``import apex`` finds on this machine.

    Attributes:
        status: ``usable``: NVIDIA's, with its kernels. ``uncompiled``: NVIDIA's without a working ``amp_C``, the module
            of its kernels. ``broken``: NVIDIA's, but importing it fails. ``impostor``: another package of that name.
            ``missing``: no such package.
        version: the installed version, or '' if unknown.
        location: its folder or file, or '' if it is missing.
        reason: for ``uncompiled`` and ``broken``, the error raised on import.
    """

    status: Literal["usable", "uncompiled", "broken", "impostor", "missing"]
    version: str = ""
    location: str = ""
    reason: str = ""


@functools.cache
def find_apex() -> Apex:
    """Find out which apex is installed. Cached.

    A package that cannot be NVIDIA's is not imported, so that an impostor's code does not run.
    """
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
    except Exception as error:  # built for another torch version, it can raise anything
        return Apex("broken", version, location, one_line(error))
    if not hasattr(optimizers, "FusedAdam"):
        return Apex("impostor", version, location)
    try:
        importlib.import_module("amp_C").multi_tensor_adam  # noqa: B018
    except Exception as error:
        return Apex("uncompiled", version, location, one_line(error))
    return Apex("usable", version, location)


def check_apex() -> None:
    """Refuse a package called apex that is not NVIDIA's, before megatron-core mistakes it for NVIDIA's.

    Raises:
        ConfigError: there is such a package; the message says where it is and how to remove it.
    """
    apex = find_apex()
    if apex.status == "impostor":
        raise ConfigError(
            f"{apex.location} is not NVIDIA's apex, but megatron-core would mistake it for that: run `{UNINSTALL}`, or "
            "remove or rename it if pip did not install it"
        )


def adamw_by(device: torch.device) -> Literal["apex", "torch"]:
    """Whose fused AdamW kernel updates fp32 tensors on a device: apex's on CUDA if it is usable, else torch's."""
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
    """One AdamW step in place with apex's kernel; equivalent to ``fused_adamw`` of ``linalg/moments.py``.

    The kernel takes its coefficients in fp32, torch in fp64. With beta2 = 0.999 this makes the second moment smaller by
    a factor of 1 - 1.3e-5; its bias correction is smaller by the same factor, so that the direction is the same.

    Args:
        weights: fp32 tensors, contiguous, non-empty, all on one CUDA device; updated in place.
        gradients: one fp32 tensor per weight, of its shape.
        exp_avgs: first moments, likewise; updated in place.
        exp_avg_sqs: second moments, likewise; updated in place.
        steps: for each weight, the number of steps taken before this one.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
    """
    applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    kernel = importlib.import_module("amp_C").multi_tensor_adam
    overflow = torch.zeros(
        1, dtype=torch.int32, device=weights[0].device
    )  # required as an argument, but not read by this kernel
    for done in sorted(set(steps)):  # one launch has one step count for all of its tensors
        alike = [i for i, step in enumerate(steps) if step == done]
        lists = [[tensors[i] for i in alike] for tensors in (gradients, weights, exp_avgs, exp_avg_sqs)]
        correct_bias = 1
        applier(kernel, overflow, lists, lr, *betas, eps, done + 1, DECOUPLED, correct_bias, weight_decay)
