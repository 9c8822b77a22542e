"""Who may import whom (docs/architecture.md draws the same picture), and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ds_lowrank"

# The rooms, lowest first: a file may import its own room and those named here.
ALLOWED = {
    "errors": set(),
    "collectives": set(),
    "reference": set(),
    "linalg": set(),
    "sharding": {"errors"},
    "placement": {"errors", "sharding"},
    "methods/blocks": {"linalg", "sharding"},
    "methods": {"linalg", "methods/blocks", "sharding"},
    "environment": {"errors"},
    "optimizer": {
        "collectives",
        "environment",
        "errors",
        "linalg",
        "methods",
        "methods/blocks",
        "placement",
        "sharding",
    },
    "adapters": {"errors", "linalg", "optimizer", "placement"},
    "integration": {"adapters", "collectives", "environment", "errors", "methods", "optimizer", "placement"},
    # The parts of the two programs in launch/.
    "models": {"errors", "placement", "sharding"},
    "data": {"collectives"},
    "checkpoint": {"adapters", "collectives", "errors", "placement"},
    "training": {
        "checkpoint",
        "collectives",
        "data",
        "errors",
        "integration",
        "methods",
        "models",
        "optimizer",
        "placement",
    },
    "finetuning": {"adapters", "checkpoint", "collectives", "data", "errors", "models", "training"},
    "__main__": {"environment"},
}


def room_of(module):
    """The room of a module, given as the parts of its name below the package."""
    return "methods/blocks" if module[:2] == ("methods", "blocks") else module[0]


def room_of_file(path):
    return room_of(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_lies_below(path):
    own = room_of_file(path)
    for module in imports_of(path):
        if module.startswith("ds_lowrank."):
            other = room_of(tuple(module.split(".")[1:]))
            assert other == own or other in ALLOWED[own], f"{own} must not import {other}"


@pytest.mark.parametrize("layer", ["linalg", "methods"])
def test_the_mathematics_does_not_know_about_distribution(layer):
    for path in (PACKAGE / layer).rglob("*.py"):
        assert not any(m.startswith(("torch.distributed", "deepspeed", "megatron")) for m in imports_of(path)), path


def test_references_import_nothing_else_of_the_package():
    """Also not in ``__init__.py``: an oracle that shares code with the package would share its errors."""
    imported = {module for path in (PACKAGE / "reference").glob("*.py") for module in imports_of(path)}
    own = {module for module in imported if module.split(".")[0] == "ds_lowrank"}
    assert own and all(module.startswith("ds_lowrank.reference") for module in own)
    assert {module.split(".")[0] for module in imported - own} <= {*sys.stdlib_module_names, "torch"}


def test_rooms_that_import_deepspeed_are_these():
    users = {room_of_file(p) for p in FILES if any(m.split(".")[0] == "deepspeed" for m in imports_of(p))}
    assert users == {"adapters", "checkpoint", "environment", "finetuning", "integration", "models", "training"}


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
