"""What must be the same on all nodes of a job: packages, the command line, and the files that it names."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator

import ds_lowrank
from ds_lowrank.training.roll_call import Presence

PACKAGE = Path(ds_lowrank.__file__).parent
FILES = ("deepspeed_config", "model")
"""Flags whose files are compared by their contents too."""
PLACES = ("cache", "data", "validation", "tokenizer", "local_rank")
"""Arguments that may differ: a node may have its copy of the data elsewhere. What is in them is compared later."""


def facts(arguments: Namespace | None = None) -> dict[str, str]:
    """What this process has that the other ranks must have too, by name.

    Args:
        arguments: the command line of a program; None for the packages only.
    """
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "ds_lowrank": f"{ds_lowrank.__version__} (source {_source()})",
        "the accelerator": get_accelerator().device_name(),
    }
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if arguments is None:
        return found
    if max(getattr(arguments, "tensor_parallel", 1), getattr(arguments, "pipeline_parallel", 1)) > 1:
        found["megatron-core"] = _version("megatron-core")
    for name, value in vars(arguments).items():
        if name in PLACES:
            continue
        flag = f"--{name}" if name == "deepspeed_config" else f"--{name.replace('_', '-')}"
        found[flag] = str(value)
        if name in FILES and (contents := _contents(Path(str(value)))):
            found[f"the file of {flag}"] = f"{value} (contents {contents})"
    return found


def difference(ranks: Sequence[Presence]) -> str | None:
    """Say in one line what differs between ranks, and on which nodes; None if nothing does.

    Args:
        ranks: what every rank says of itself.
    """
    names = list(dict.fromkeys(name for rank in ranks for name in rank.facts))
    found = []
    for name in names:
        hosts: dict[str, list[str]] = {}
        for rank in ranks:
            if name in rank.facts:  # a file that is missing is said by the ranks that miss it
                hosts.setdefault(rank.facts[name], []).append(rank.host)
        if len(hosts) > 1:
            found.append(f"{name} is {_where(hosts)}")
    if not found:
        return None
    more = f" (and {len(found) - 3} more differences)" if len(found) > 3 else ""
    return f"the nodes of this job differ: {'; '.join(found[:3])}{more}. Give all nodes the same"


def _where(hosts: Mapping[str, Sequence[str]]) -> str:
    """The values with their nodes, the rarest first, which is most likely the one to change."""
    parts = []
    for value, names in sorted(hosts.items(), key=lambda item: len(item[1])):
        different = list(dict.fromkeys(names))
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        parts.append(f"{value} on {', '.join(different[:3])}{more}")
    return ", ".join(parts)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _source() -> str:
    """A hash of this package's code: checkouts of one version number may differ."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _contents(path: Path) -> str | None:
    """A hash of a file, or of a model folder's configuration; None if there is none, which is said later."""
    try:
        return hashlib.sha256((path / "config.json" if path.is_dir() else path).read_bytes()).hexdigest()[:8]
    except OSError:
        return None
