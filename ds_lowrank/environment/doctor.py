"""``python -m ds_lowrank doctor``: what is installed, what of it is used, what is missing."""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import dataclass

import torch

from ds_lowrank.environment.apex import UNINSTALL, Apex, adamw_by, find_apex
from ds_lowrank.environment.packages import is_importable, one_line, version_of

BUILD = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation git+https://github.com/NVIDIA/apex"
"""Needs CUDA's compiler."""
CONTAINER = "NVIDIA's PyTorch container (nvcr.io/nvidia/pytorch) has it"


@dataclass(frozen=True)
class Package:
    """One that the tests know.

    Attributes:
        name: of the distribution.
        module: that it brings.
        tested: the version, or its beginning, that the tests run with; empty where they run without it.
        use: what for.
        get: the command that installs it, from the checkout.
        required: whether nothing works without it.
        pinned: whether another version is wrong, not only untested.
    """

    name: str
    module: str
    tested: str
    use: str
    get: str
    required: bool = False
    pinned: bool = False


PACKAGES = (
    Package("torch", "torch", "2.13.0", "everything", "pip install torch==2.13.0", required=True),
    Package("deepspeed", "deepspeed", "0.19.8", "ZeRO", "pip install deepspeed==0.19.8", required=True, pinned=True),
    Package(
        "megatron-core", "megatron.core", "0.16.1", "tensor and pipeline parallelism, data", 'pip install ".[megatron]"'
    ),
    Package("transformers", "transformers", "5", "the scripts in launch/", 'pip install ".[train]"'),
    Package(
        "transformer-engine",
        "transformer_engine",
        "",
        f"megatron-core's fused layers on CUDA; {CONTAINER}",
        'pip install --no-build-isolation "transformer-engine[pytorch]"',
    ),
)


@dataclass(frozen=True)
class Line:
    """One of the report; the remedy is a command."""

    name: str
    value: str
    text: str = ""
    remedy: str = ""
    wrong: bool = False


def package_line(package: Package) -> Line:
    """Whether it is there, in which version, and if not how to get it. Nothing is imported."""
    version = installed_version(package)
    if version is None:
        kind = "required" if package.required else "optional"
        return Line(package.name, "missing", f"{kind}, for {package.use}", package.get, wrong=package.required)
    if not package.tested:
        return Line(package.name, version, "the tests run without it")
    plain = version.split("+")[0]
    if plain == package.tested or plain.startswith(package.tested + "."):
        return Line(package.name, version)
    if package.pinned:
        return Line(package.name, version, f"{package.tested} is needed", package.get, wrong=True)
    return Line(package.name, version, f"not the tested version, {package.tested}")


def installed_version(package: Package) -> str | None:
    """None where it cannot be imported."""
    return version_of(package.name) or "unknown" if is_importable(package.module) else None


def apex_line(apex: Apex) -> Line:
    """What goes by its name, and what to do about it."""
    found = f"{apex.version} in {apex.location}".strip()
    match apex.status:
        case "usable":
            return Line("apex", apex.version or "unknown")
        case "missing":
            return Line("apex", "missing", f"optional, for its AdamW on CUDA; not on PyPI; {CONTAINER}", BUILD)
        case "impostor":
            text = f"{found} is not NVIDIA's, and megatron-core takes it for that"
            return Line("apex", "impostor", text, UNINSTALL, wrong=True)
        case "uncompiled":
            return Line("apex", "not compiled", f"{found} has no usable amp_C ({apex.reason})", BUILD)
        case "broken":
            return Line("apex", "broken", f"{found} does not import ({apex.reason})", BUILD, wrong=True)


def machine_lines(deepspeed: bool) -> list[Line]:
    """The device, what DeepSpeed makes of it, and whose AdamW steps what is not projected.

    Args:
        deepspeed: whether it is installed.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = found or torch.device("cpu")
    lines = [Line("accelerator", "unknown", "DeepSpeed chooses it")]
    if deepspeed:
        try:
            name, backend = deepspeed_accelerator()
        except Exception as error:  # an impostor that DeepSpeed imports may raise anything
            lines = [Line("accelerator", "unknown", f"deepspeed does not import: {one_line(error)}", wrong=True)]
        else:
            device = torch.device(name)
            lines = [Line("accelerator", name, "by DeepSpeed"), Line("communication", backend)]
    adamw = Line("AdamW", f"by {adamw_by(device)}", "of what is not projected")
    return [Line("device", device_name(device)), *lines, adamw]


def device_name(device: torch.device) -> str:
    """The model of the first, and how many there are."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} cores, {platform.machine()}" if device.type == "cpu" else device.type


def deepspeed_accelerator() -> tuple[str, str]:
    """DeepSpeed's names of the accelerator and of the communication backend."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that it found no GPU is in the report
    try:
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
    finally:
        logging.disable(before)
    return str(accelerator.device_name()), str(accelerator.communication_backend_name())


def examine() -> list[Line]:
    """All lines of the report."""
    packages = [package_line(package) for package in PACKAGES]
    deepspeed = is_importable("deepspeed")
    return [*packages, apex_line(find_apex()), *machine_lines(deepspeed)]


def doctor() -> int:
    """Print the report.

    Returns:
        The exit code: 1 where something required is missing or something is wrong.
    """
    lines = examine()
    names = max(len(line.name) for line in lines)
    values = max(len(line.value) for line in lines)
    for line in lines:
        mark = "WRONG: " if line.wrong else ""
        print(f"{line.name:{names}}  {line.value:{values}}  {mark}{line.text}".rstrip())
        if line.remedy:
            print(f"{'':{names}}  {'':{values}}  $ {line.remedy}")
    wrong = [line.name for line in lines if line.wrong]
    print(f"\nWrong: {', '.join(wrong)}." if wrong else "\nEverything required is there.")
    return 1 if wrong else 0
