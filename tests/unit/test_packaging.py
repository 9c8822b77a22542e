"""What is built and installed, and that tools leave ``runs/`` alone, where the README's commands write."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ds_lowrank
from tests.conftest import SLOW
from tests.unit.pages import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOOLS = PYPROJECT["tool"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the checkout with the setuptools of the environment."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = ["pyproject.toml", "README.md", "LICENSE", "launch/pretrain.py", "benchmarks/__init__.py"]
    files += [
        str(path.relative_to(ROOT)) for path in (ROOT / "ds_lowrank").rglob("*") if path.suffix in (".py", ".typed")
    ]
    for name in [*files, "runs/ds_lowrank/__init__.py"]:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes() if name in files else b"")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(output)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, timeout=300)
    (path,) = output.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_the_wheel_has_every_module_of_the_package_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ds_lowrank").rglob("*.py")}
    assert names == modules | {"ds_lowrank/py.typed"}


@pytest.mark.slow
def test_the_wheel_has_the_package_version_its_licence_and_its_requirements(wheel):
    (metadata,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert f"\nVersion: {ds_lowrank.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert set(PYPROJECT["project"]["dependencies"]) == set(re.findall(r"^Requires-Dist: ([^;\n]*)$", metadata, re.M))
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_version_is_a_literal_in_one_place():
    """A literal lets setuptools read it without importing torch."""
    assert "version" not in PYPROJECT["project"]
    assert TOOLS["setuptools"]["dynamic"]["version"] == {"attr": "ds_lowrank.__version__"}
    tree = ast.parse((ROOT / "ds_lowrank/__init__.py").read_text())
    (assignment,) = (n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__version__")
    assert isinstance(assignment.value, ast.Constant)
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert newest == ds_lowrank.__version__


def test_tools_leave_runs_alone():
    assert "runs" in TOOLS["ruff"]["extend-exclude"]
    assert any(re.match(pattern, "runs/quickstart/export/model.py") for pattern in TOOLS["mypy"]["exclude"])
    assert not any(folder.startswith("runs") for folder in TOOLS["mypy"]["files"])
    assert "runs" in TOOLS["pytest"]["ini_options"]["norecursedirs"]
    assert "./runs" in TOOLS["codespell"]["skip"].split(",")
    assert TOOLS["setuptools"]["packages"]["find"]["include"] == ["ds_lowrank*"]
    assert "runs/" in (ROOT / ".gitignore").read_text().split()


def test_constraints_pin_every_tool_that_the_hooks_run():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    hooks = set(re.findall(r"entry: (\w+)", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert hooks == {"ruff", "mypy", "codespell"}
    assert hooks <= pinned.keys()
    assert hooks <= set(PYPROJECT["project"]["optional-dependencies"]["dev"])


def test_every_target_of_the_makefile_is_described():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split())
    assert set(re.findall(r"^([a-z]+):.*?## \S", makefile, re.M)) == targets


def test_the_slow_tests_that_quick_leaves_out_exist():
    text = "".join(path.read_text() for path in Path(ROOT / "tests").rglob("test_*.py"))
    missing = {name for name in SLOW if f"def {name}(" not in text}
    assert not missing, f"remove these names from SLOW in tests/conftest.py, or update them: {sorted(missing)}"
