"""``python -m ds_lowrank doctor``: which packages are installed, which are used, and what is missing."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_lowrank.environment.apex import UNINSTALL, Apex, adamw_by, find_apex
from ds_lowrank.environment.packages import is_importable, one_line, version_of

BUILD = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation git+https://github.com/NVIDIA/apex"
"""The command that builds apex from source. It needs CUDA's compiler, ``nvcc``."""
CONTAINER = "NVIDIA's PyTorch container (nvcr.io/nvidia/pytorch) has it"


@dataclass(frozen=True)
class Package:
    """A package that ds_lowrank or its programs use.

    Attributes:
        name: name of the distribution.
        module: name of the module that it provides.
        tested: the version that the tests run with, or a prefix of it; '' if they run without the package.
        use: what it is used for.
        get: the command that installs it, to be run in the checkout.
        required: whether nothing works without it.
        pinned: whether any other version is wrong and not just untested.
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
    Package("accelerate", "accelerate", "1", "the Hugging Face Trainer, accelerate", 'pip install ".[huggingface]"'),
    Package("trl", "trl", "1.16.0", "TRL", 'pip install ".[huggingface]"'),
    Package("peft", "peft", "0.21.2", "LoRA in launch/finetune.py", 'pip install ".[finetune]"'),
    Package("lm-eval", "lm_eval", "0.4.13", "python -m ds_lowrank evaluate", 'pip install ".[evaluate]"'),
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
    """One line of the report.

    Attributes:
        name: the package or property.
        value: its version or status.
        text: an explanation, or ''.
        remedy: a command that helps, or ''.
        wrong: whether the installation cannot work like this.
    """

    name: str
    value: str
    text: str = ""
    remedy: str = ""
    wrong: bool = False


def package_line(package: Package) -> Line:
    """Report a package's version, or how to install it. The package is not imported."""
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
    """The version of a package: ``unknown`` if it has no metadata, None if it cannot be imported."""
    return version_of(package.name) or "unknown" if is_importable(package.module) else None


def apex_line(apex: Apex) -> Line:
    """Report which apex is installed, and what to do about it."""
    found = f"{apex.version} in {apex.location}".strip()
    match apex.status:
        case "usable":
            return Line("apex", apex.version or "unknown")
        case "missing":
            return Line("apex", "missing", f"optional, for its AdamW on CUDA; not on PyPI; {CONTAINER}", BUILD)
        case "impostor":
            text = f"{found} is not NVIDIA's, but megatron-core mistakes it for that"
            return Line("apex", "impostor", text, UNINSTALL, wrong=True)
        case "uncompiled":
            return Line("apex", "not compiled", f"{found} has no usable amp_C ({apex.reason})", BUILD)
        case "broken":
            return Line("apex", "broken", f"{found} does not import ({apex.reason})", BUILD, wrong=True)


def machine_lines(deepspeed: bool) -> list[Line]:
    """Report the device, DeepSpeed's choices for it, and which AdamW kernel updates non-projected parameters.

    Args:
        deepspeed: whether DeepSpeed is installed.
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
            lines = [Line("accelerator", name, "chosen by DeepSpeed"), Line("communication", backend)]
    adamw = Line("AdamW", f"by {adamw_by(device)}", "for non-projected parameters")
    return [Line("device", device_name(device)), *lines, adamw]


def device_name(device: torch.device) -> str:
    """The model and number of the GPUs, or of the CPU cores."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} cores, {platform.machine()}" if device.type == "cpu" else device.type


def deepspeed_accelerator() -> tuple[str, str]:
    """The names of the accelerator and of the communication backend that DeepSpeed uses."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the report itself says that there is no GPU
    try:
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
    finally:
        logging.disable(before)
    return str(accelerator.device_name()), str(accelerator.communication_backend_name())


def examine() -> list[Line]:
    """Examine the installation and make all lines of the report."""
    packages = [package_line(package) for package in PACKAGES]
    deepspeed = is_importable("deepspeed")
    return [*packages, apex_line(find_apex()), *machine_lines(deepspeed)]


def doctor() -> int:
    """Print the report.

    Returns:
        The exit code: 1 if something required is missing or something is wrong, else 0.
    """
    return print_report(examine(), "Everything required is installed.")


def print_report(lines: Sequence[Line], content: str) -> int:
    """Print the lines of a report as a table, and a last line that sums them up.

    Args:
        lines: the lines.
        content: the last line if nothing is wrong.

    Returns:
        The exit code: 1 if something is wrong, else 0.
    """
    names = max(len(line.name) for line in lines)
    values = max(len(line.value) for line in lines)
    for line in lines:
        mark = "WRONG: " if line.wrong else ""
        print(f"{line.name:{names}}  {line.value:{values}}  {mark}{line.text}".rstrip())
        if line.remedy:
            print(f"{'':{names}}  {'':{values}}  $ {line.remedy}")
    wrong = [line.name for line in lines if line.wrong]
    print(f"\nWrong: {', '.join(wrong)}." if wrong else f"\n{content}")
    return 1 if wrong else 0
