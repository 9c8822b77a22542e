"""What ``python -m ds_lowrank doctor`` says, and when it is content."""

import os
import runpy
import subprocess
import sys
import tomllib

import pytest
import torch

from ds_lowrank.environment import doctor
from ds_lowrank.environment.apex import Apex
from ds_lowrank.environment.doctor import BUILD, PACKAGES, Line, Package, apex_line, machine_lines, package_line
from tests.unit.apex_packages import write_pypi_apex
from tests.unit.pages import ROOT


def of(name="json", tested="1.2", **flags):
    return Package(name, name, tested, "use", "get", **flags)


@pytest.mark.parametrize(
    ("package", "line"),
    [
        (of("no_such_module"), Line("no_such_module", "missing", "optional, for use", "get")),
        (of("no_such.module"), Line("no_such.module", "missing", "optional, for use", "get")),
        (of("no_such", required=True), Line("no_such", "missing", "required, for use", "get", wrong=True)),
        (of(tested="1.2.3"), Line("json", "1.2.3+cpu")),
        (of(tested="1"), Line("json", "1.2.3+cpu")),
        (of(tested=""), Line("json", "1.2.3+cpu", "the tests run without it")),
        (of(tested="1.2.30"), Line("json", "1.2.3+cpu", "not the tested version, 1.2.30")),
        (of(tested="1.2.4", pinned=True), Line("json", "1.2.3+cpu", "1.2.4 is needed", "get", wrong=True)),
    ],
)
def test_a_package_and_its_version(monkeypatch, package, line):
    monkeypatch.setattr(doctor, "version_of", lambda name: "1.2.3+cpu")
    assert package_line(package) == line


def test_a_package_that_does_not_say_its_version():
    assert package_line(of(tested="")).value == "unknown"


def test_the_tested_versions_are_those_that_are_installed_for_the_tests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)}
    lines = [line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines()]
    constraints = {name.replace("_", "-"): version for name, _, version in lines}
    for package in PACKAGES:
        if package.tested:
            assert f"{constraints[package.name]}.".startswith(f"{package.tested}."), package.name
        if package.pinned:
            assert f"{package.name}=={package.tested}" in asked


@pytest.mark.parametrize(
    ("apex", "line"),
    [
        (Apex("usable", "0.1", "/x/apex"), Line("apex", "0.1")),
        (
            Apex("impostor", "0.9", "/x/apex"),
            Line(
                "apex",
                "impostor",
                "0.9 in /x/apex is not NVIDIA's, but megatron-core mistakes it for that",
                "pip uninstall apex",
                wrong=True,
            ),
        ),
        (
            Apex("uncompiled", "", "/x/apex", "ImportError: no"),
            Line("apex", "not compiled", "in /x/apex has no usable amp_C (ImportError: no)", BUILD),
        ),
        (
            Apex("broken", "0.1", "/x/apex", "KeyError: y"),
            Line("apex", "broken", "0.1 in /x/apex does not import (KeyError: y)", BUILD, wrong=True),
        ),
    ],
)
def test_what_is_said_of_apex(apex, line):
    assert apex_line(apex) == line


def test_where_there_is_no_apex_it_says_how_to_get_it():
    line = apex_line(Apex("missing"))
    assert "not on PyPI" in line.text and line.remedy == BUILD and not line.wrong


def test_without_deepspeed_the_device_is_torchs(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    device, accelerator, adamw = machine_lines(deepspeed=False)
    assert device.value.endswith("cores, " + os.uname().machine)
    assert (accelerator.value, adamw.value) == ("unknown", "by torch")


def test_a_deepspeed_that_does_not_import_is_wrong(monkeypatch):
    def fail():
        raise SyntaxError("invalid syntax")

    monkeypatch.setattr(doctor, "deepspeed_accelerator", fail)
    lines = machine_lines(deepspeed=True)
    assert Line("accelerator", "unknown", "deepspeed does not import: SyntaxError: invalid syntax", wrong=True) in lines


@pytest.mark.parametrize("status", ["usable", "missing"])
def test_the_report_of_a_whole_installation(monkeypatch, capsys, status):
    monkeypatch.setattr(doctor, "find_apex", lambda: Apex(status, "0.1", "/x/apex"))
    monkeypatch.setattr(sys, "argv", ["ds_lowrank", "doctor"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("ds_lowrank", run_name="__main__")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.endswith("\nEverything required is installed.\n")
    found = [line.split()[0] for line in out.splitlines() if line[:1].strip()]
    machine = ["device", "accelerator", "communication", "AdamW"]
    assert found == [*(package.name for package in PACKAGES), "apex", *machine, "Everything"]
    versions = {line.split()[0]: line.split()[1] for line in out.splitlines() if len(line.split()) > 1}
    assert versions["torch"] == torch.__version__ and versions["deepspeed"] == "0.19.8"


def test_without_the_other_packages_it_still_reports():
    code = (
        "import runpy, sys, torch;"
        "sys.modules.update(dict.fromkeys(['deepspeed', 'megatron', 'transformers', 'transformer_engine', 'apex']));"
        "sys.argv[1:] = ['doctor'];\n"
        "try: runpy.run_module('ds_lowrank', run_name='__main__')\n"
        "finally: assert not torch.distributed.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    for name in ("deepspeed", "megatron-core", "transformers", "transformer-engine", "apex"):
        assert f"\n{name} " in done.stdout
    assert done.stdout.count("missing ") == 5
    assert done.stdout.endswith("\nWrong: deepspeed.\n")


def test_pypis_apex_is_wrong(tmp_path):
    write_pypi_apex(tmp_path)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", str(ROOT))])
    command = [sys.executable, "-m", "ds_lowrank", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 1, done.stderr
    assert f"WRONG: 0.9.10.dev0 in {tmp_path}/apex is not NVIDIA's" in done.stdout
    assert "$ pip uninstall apex\n" in done.stdout
    assert done.stdout.endswith("\nWrong: apex.\n")
