"""When a function is compiled, and what happens where that is not possible."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ds_lowrank.linalg.compiled import compiled_on_cuda


class OnCard(torch.Tensor):
    """A CPU tensor that says it is on a card."""

    is_cuda = True


@pytest.fixture
def on_card():
    return torch.ones(3).as_subclass(OnCard)


class Compiler:
    """Stands in for torch.compile: returns ``compiled``, and keeps what it was called with."""

    def __init__(self, compiled):
        self.compiled, self.calls = compiled, []

    def __call__(self, function, **options):
        self.calls.append(options)
        return self.compiled


def plain(x, y):
    return x + y


def no_compiler(x, y):
    raise RuntimeError("Cannot find a working triton installation: no_compiler\nmore about it")


def test_on_cuda_the_compiled_function_runs_and_is_compiled_once(on_card):
    compiler = Compiler(lambda x, y: x * 10 + y)
    function = compiled_on_cuda(plain, compiler)
    assert not compiler.calls
    for _ in range(3):
        assert torch.equal(function(on_card, torch.ones(3)), torch.full((3,), 11.0))
    assert compiler.calls == [{"dynamic": True}]


def test_on_a_cpu_nothing_is_compiled():
    compiler = Compiler(no_compiler)
    assert torch.equal(compiled_on_cuda(plain, compiler)(torch.ones(3), torch.ones(3)), torch.full((3,), 2.0))
    assert not compiler.calls


def test_where_it_cannot_be_compiled_it_runs_as_it_is_and_one_warning_names_the_reason(on_card, caplog):
    compiler = Compiler(no_compiler)
    functions = [compiled_on_cuda(plain, compiler) for _ in range(2)]
    for function in (*functions, *functions):
        assert torch.equal(function(on_card, torch.ones(3)), torch.full((3,), 2.0))
    assert len(compiler.calls) == 2
    (record,) = caplog.records
    assert record.name == "ds_lowrank" and record.levelname == "WARNING"
    assert record.getMessage().endswith("RuntimeError: Cannot find a working triton installation: no_compiler")


def test_a_compiler_that_is_not_there_at_all_is_no_error(on_card, caplog):
    def unsupported(function, **options):
        raise RuntimeError("torch.compile is not supported on this Python")

    assert torch.equal(compiled_on_cuda(plain, unsupported)(on_card, torch.ones(3)), torch.full((3,), 2.0))
    assert "not supported on this Python" in caplog.text


def test_an_error_of_the_function_itself_is_raised(on_card):
    def broken(x):
        raise ValueError("wrong shape")

    with pytest.raises(ValueError, match="wrong shape"):
        compiled_on_cuda(broken, Compiler(broken))(on_card)


def test_running_out_of_memory_once_does_not_end_compiling(on_card):
    free = iter([False, True])

    def compiled(x, y):
        if not next(free):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x * 10 + y

    function = compiled_on_cuda(plain, Compiler(compiled))
    with pytest.raises(torch.OutOfMemoryError):
        function(on_card, torch.ones(3))
    assert torch.equal(function(on_card, torch.ones(3)), torch.full((3,), 11.0))


def test_the_environment_switches_it_off(on_card, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    compiler = Compiler(no_compiler)
    assert torch.equal(compiled_on_cuda(plain, compiler)(on_card, torch.ones(3)), torch.full((3,), 2.0))
    assert not compiler.calls


def test_the_compiled_function_does_not_see_what_its_arguments_are_views_of(on_card):
    seen = []
    function = compiled_on_cuda(plain, Compiler(lambda x, y: seen.append(y) or x))
    function(on_card, torch.ones(5, 3)[2])
    assert not seen[0]._is_view() and torch.equal(seen[0], torch.ones(3))


def test_a_step_with_quantized_moments_on_a_cpu_does_not_load_the_compiler():
    code = (
        "import sys, torch; from ds_lowrank.linalg.quantization import Int8; code = Int8(signed=True);"
        "out = {s: torch.empty(2, *shape, dtype=t) for s, (shape, t) in code.tensors(70, 3).items()};"
        "before = {name for name in sys.modules if 'inductor' in name};"
        "code.encode(torch.ones(2, 70, 3), 0, torch.zeros(2, dtype=torch.int32), out); code.decode(out);"
        "assert {name for name in sys.modules if 'inductor' in name} == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
