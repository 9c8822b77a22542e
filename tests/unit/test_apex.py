"""Which apex is there, whose AdamW is taken, and that it is the same AdamW."""

import importlib
import sys
import tomllib

import pytest
import torch

import ds_lowrank
from ds_lowrank.environment.apex import Apex, adamw_by, apex_adamw, check_apex, find_apex
from ds_lowrank.linalg.moments import fused_adamw
from ds_lowrank.optimizer.report import role_table, take_inventory
from tests.unit.apex_packages import KERNEL, write_files, write_nvidia_apex, write_pypi_apex
from tests.unit.pages import ROOT

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def forget():
    find_apex.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """First on the path, in a process that has not looked for apex."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = [name for name in sys.modules if name.split(".")[0] in {"apex", "amp_C"}]
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    forget()
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in {"apex", "amp_C"}]:
        del sys.modules[name]
    forget()


def test_where_there_is_none_torch_steps(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    assert find_apex() == Apex("missing")
    assert adamw_by(CUDA) == adamw_by(CPU) == "torch"
    check_apex()


def test_nvidias_is_used_on_cuda_only(folder):
    write_nvidia_apex(folder)
    assert find_apex() == Apex("usable", "0.1", str(folder / "apex"))
    assert (adamw_by(CUDA), adamw_by(CPU)) == ("apex", "torch")
    check_apex()


def test_on_a_cpu_nothing_is_looked_for(folder):
    write_nvidia_apex(folder)
    adamw_by(CPU)
    assert "apex" not in sys.modules


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("raise ImportError('undefined symbol:\\n _ZN3c10')", "ImportError: undefined symbol: _ZN3c10"),
        ("", "AttributeError: module 'amp_C' has no attribute 'multi_tensor_adam'"),
    ],
)
def test_nvidias_without_its_kernels_says_why(folder, kernel, reason):
    write_nvidia_apex(folder, kernel)
    assert find_apex() == Apex("uncompiled", "0.1", str(folder / "apex"), reason)
    assert adamw_by(CUDA) == "torch"
    check_apex()


def test_nvidias_built_for_python_only(folder, monkeypatch):
    write_nvidia_apex(folder)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    assert find_apex().status == "uncompiled"


def test_nvidias_that_does_not_import(folder):
    write_nvidia_apex(folder, init="import torch\ntorch._six_of_old.container_abcs")
    assert find_apex().status == "broken"
    assert find_apex().reason.startswith("AttributeError: ")
    assert adamw_by(CUDA) == "torch"
    check_apex()


IMPOSTORS = {
    "of PyPI": write_pypi_apex,
    "a module": lambda folder: write_files(folder, {"apex.py": ""}),
    "a folder without code": lambda folder: write_files(folder, {"apex/notes.txt": ""}),
    "optimizers of another kind": lambda folder: write_files(
        folder, {"apex/__init__.py": "", "apex/optimizers/sgd.py": ""}
    ),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_an_impostor_is_not_used_and_refused_in_one_line(folder, kind):
    IMPOSTORS[kind](folder)
    assert find_apex().status == "impostor"
    assert adamw_by(CUDA) == "torch"
    with pytest.raises(ds_lowrank.ConfigError, match=r"not NVIDIA's apex.*run `pip uninstall apex`") as caught:
        check_apex()
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_the_code_of_pypis_does_not_run(folder):
    write_files(folder, {"apex/__init__.py": "raise SystemExit('ran')"})
    assert find_apex().status == "impostor"


def test_it_is_looked_for_once(folder):
    write_pypi_apex(folder)
    first = find_apex()
    (folder / "apex/optimizers").mkdir()
    assert find_apex() is first


def drawn(steps, seed=0):
    """Weights, gradients, moments of tensors that have done some steps."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [101 + 7 * i for i in range(len(steps))]
    weights, gradients, first = ([torch.randn(n, generator=generator) for n in sizes] for _ in range(3))
    second = [torch.rand(n, generator=generator) for n in sizes]
    for done, m, v in zip(steps, first, second, strict=True):
        m.mul_(min(done, 1))
        v.mul_(min(done, 1))
    return weights, gradients, first, second


def distance(ours, theirs):
    ours, theirs = torch.cat(ours).double(), torch.cat(theirs).double()
    return float((ours - theirs).norm() / theirs.norm())


def both(steps, *hyper):
    """How far apart weights and moments are after one step by apex and one by torch."""
    ours, theirs = drawn(steps), drawn(steps)
    apex_adamw(*ours, steps, *hyper)
    fused_adamw(*theirs, steps, *hyper)
    assert distance(theirs[0], drawn(steps)[0]) > 1e-4
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True)), "gradients are only read"
    return [distance(a, b) for a, b in zip(ours, theirs, strict=True)]


def test_the_arithmetic_is_torchs(folder):
    """With coefficients that fp32 holds exactly, each is one step of the same formula."""
    write_nvidia_apex(folder)
    for decay in (0.0, 2.0**-5):
        assert max(both([0, 3, 0, 7, 3], 2.0**-7, (0.875, 1 - 2.0**-10), 2.0**-27, decay)) < 1e-7


def test_coefficients_that_fp32_rounds_move_the_weights_no_further(folder):
    write_nvidia_apex(folder)
    weights, _, first, second = both([0, 0, 0], 1e-3, (0.9, 0.999), 1e-8, 0.01)
    assert weights < 1e-7
    assert first < 4e-7  # 1 - 0.9 in fp32 is off by 2.4e-7 of itself
    assert 1e-5 < second < 2e-5  # and 1 - 0.999 by 1.3e-5: the stand-in rounds where the kernel does


def test_one_launch_for_all_tensors_that_have_done_as_many_steps(folder):
    write_nvidia_apex(folder)
    steps = [4, 0, 4, 9, 0, 4]
    apex_adamw(*drawn(steps), steps, 1e-3, (0.9, 0.999), 1e-8, 0.0)
    assert sys.modules["amp_C"].launches == [(1, 2), (5, 3), (10, 1)]


def trained(**options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(12, 8), torch.nn.Linear(8, 16), torch.nn.LayerNorm(16))
    optimizer = ds_lowrank.GaLore(model, lr=1e-3, rank=2, weight_decay=0.01, **options)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.arange(step, step + 6)).square().sum().backward()
        optimizer.step()
    return role_table([take_inventory(optimizer.slots, [])], (0, 0), 1), [
        p.detach().view(-1) for p in model.parameters()
    ]


@pytest.fixture
def pretend_cuda(folder, monkeypatch):
    """What is decided for CUDA is done on the CPU, by the stand-in."""
    write_nvidia_apex(folder)
    for module in ("optimizer.adamw", "optimizer.report"):
        monkeypatch.setattr(f"ds_lowrank.{module}.adamw_by", lambda device: adamw_by(CUDA))


def test_a_step_takes_apexs_and_says_so(pretend_cuda):
    text, weights = trained()
    assert "1 of 5 parameters is projected; the other 4 use apex's fused AdamW.\n" in text
    assert sys.modules["amp_C"].launches == [(1, 4), (2, 4), (3, 4)]
    expected_text, expected = trained_by_torch()
    assert text == expected_text.replace("torch's", "apex's")
    assert distance(weights, expected) < 1e-6


def trained_by_torch():
    with pytest.MonkeyPatch.context() as patch:
        for module in ("optimizer.adamw", "optimizer.report"):
            patch.setattr(f"ds_lowrank.{module}.adamw_by", lambda device: "torch")
        return trained()


@pytest.mark.parametrize("state_dtype", ["bf16", "int8"])
def test_stored_moments_of_fewer_bits_are_not_for_apex(pretend_cuda, state_dtype):
    text, _ = trained(state_dtype=state_dtype)
    assert "the other 4 use torch's fused AdamW on fp32 copies.\n" in text
    assert "amp_C" not in sys.modules or sys.modules["amp_C"].launches == []


def test_the_stand_in_knows_the_other_mode_too(folder):
    """Which a wrong mode in the call would take: then decay passes through the moments."""
    write_nvidia_apex(
        folder, KERNEL.replace("mode == 0", "mode == 1").replace("if mode == 1 else", "if mode == 0 else")
    )
    assert max(both([0, 3], 2.0**-7, (0.875, 1 - 2.0**-10), 2.0**-27, 2.0**-5)) > 1e-3


def test_no_install_asks_for_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    assert not [name for name in asked if name.startswith("apex")]
