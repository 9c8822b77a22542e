"""Who may import whom (docs/sharding.md draws the same picture), and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ds_lowrank"

# The layers of a step, lowest first: a layer may import itself and those named.
ALLOWED = {
    "errors": set(),
    "apex": {"errors"},
    "linalg": set(),
    "sharding": {"errors"},
    "methods": {"linalg", "sharding"},
    "config": {"errors", "methods"},
    "roles": {"errors", "sharding"},
    "slots": {"methods", "roles", "sharding"},
    "report": {"apex", "slots"},
    "state": {"errors", "slots"},
    "elementwise": {"apex", "linalg", "methods", "sharding", "slots"},
    "placing": {"errors", "methods", "roles", "sharding", "slots"},
    "groups": {"config", "errors", "methods", "placing", "roles", "sharding"},
    "optimizer": {
        "config",
        "elementwise",
        "errors",
        "groups",
        "methods",
        "perturbation",
        "placing",
        "report",
        "sharding",
        "slots",
        "state",
        "together",
    },
    "optimizers": {"methods", "optimizer"},
    "support": {"errors", "models", "sharding"},
    "doctor": {"apex"},
    "__main__": {"doctor"},
    "backward": {"errors", "optimizer", "together"},
    "perturbation": {"methods", "sharding", "slots"},
    "parallel": {"apex", "errors", "sharding"},
    "pipeline": {"backward", "errors", "optimizer"},
    "engine": {
        "config",
        "errors",
        "methods",
        "models",
        "optimizer",
        "optimizers",
        "parallel",
        "roles",
        "sharding",
        "support",
        "together",
    },
    # Beside the step: the parts of the training script.
    "together": set(),
    "data": {"together"},
    "models": {"errors", "linalg", "roles", "sharding"},
    "checkpoint": {"errors", "models", "roles", "sharding", "together"},
    "training": {
        "backward",
        "checkpoint",
        "data",
        "engine",
        "errors",
        "methods",
        "models",
        "optimizer",
        "parallel",
        "pipeline",
        "roles",
        "sharding",
        "support",
        "together",
    },
    "finetuning": {"checkpoint", "data", "errors", "models", "together", "training"},
}


def layer_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_layer_imports_only_what_lies_below(path):
    own = layer_of(path)
    for module in imports_of(path):
        if module.startswith("ds_lowrank."):
            other = module.split(".")[1]
            assert other == own or other in ALLOWED[own], f"{own} must not import {other}"


@pytest.mark.parametrize("layer", ["linalg", "methods"])
def test_the_mathematics_does_not_know_about_distribution(layer):
    for path in (PACKAGE / layer).rglob("*.py"):
        assert not any(m.startswith(("torch.distributed", "deepspeed", "megatron")) for m in imports_of(path)), path


def test_deepspeed_is_touched_in_a_few_places_only():
    users = {layer_of(p) for p in FILES if any(m.split(".")[0] == "deepspeed" for m in imports_of(p))}
    assert users <= {"doctor", "engine", "support", "models", "parallel", "training", "finetuning", "checkpoint"}


def test_importing_the_package_imports_neither_deepspeed_nor_transformers_and_patches_nothing():
    code = (
        "import sys, torch; before = set(dir(torch.optim)); import ds_lowrank;"
        "assert set(dir(torch.optim)) == before;"
        "bad = {'deepspeed', 'megatron', 'apex', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_imports_where_deepspeed_megatron_and_apex_are_missing():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['deepspeed', 'megatron', 'apex']));"
        "import torch, ds_lowrank; w = torch.nn.Parameter(torch.ones(4, 4)); w.grad = torch.eye(4);"
        "ds_lowrank.GaLore([('w', w)], rank=2).step()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
