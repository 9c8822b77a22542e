"""The GPU entry without a card: everything but the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.agreement import BOUNDS, SHAPES, largest_difference, train
from benchmarks.gpu.budget import Budget, OutOfTimeError, interrupted_after
from benchmarks.gpu.cases import (
    STATE_DTYPES,
    STEP_CELLS,
    WHOLE_CELLS,
    Cell,
    llama_shapes,
    method_options,
    model_config,
    parameter_count,
    tagged,
)
from benchmarks.gpu.contenders import ADAMW, OFFICIAL, Contender, step_only
from benchmarks.gpu.gpu_tests import judge
from benchmarks.gpu.report import verdict
from benchmarks.gpu.timing import Section, prepare_step, time_cells
from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.registry import OPTIMIZERS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Return what ``--device cpu --quick`` writes; it takes half a minute on an idle core."""
    output = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((output / "gpu.json").read_text()) | {"screen": done.stdout}


@pytest.mark.slow
def test_every_method_agrees_with_the_cpu(record):
    rows = {(row["method"], row["state_dtype"]): row for row in record["agreement"]}
    assert rows.keys() == {(method, state_dtype) for method in METHODS for state_dtype in STATE_DTYPES}
    for row in rows.values():
        assert row["agrees"], row
        assert row["difference"] <= row["bound"] == BOUNDS[row["state_dtype"]]
        assert 0 < row["rounding"] < row["bound"]


@pytest.mark.slow
@pytest.mark.parametrize("section", ["steps", "whole_steps"])
def test_every_method_and_peer_is_timed(record, section):
    for state_dtype in ("fp32", "int8"):
        rows = {row["optimizer"]: row for row in record[section] if row["state_dtype"] == state_dtype}
        assert rows.keys() == METHODS.keys()
        for row in rows.values():
            assert row["ordinary ms"] > 0
            assert row["over AdamW"] > 0
            assert row["peak MiB"] is None
            assert not row["error"]
        assert rows["GaLore"]["refresh ms"] > 0
    peers = [row for row in record[section] if row["state_dtype"] == "as weights"]
    assert {row["optimizer"] for row in peers} == {ADAMW, OFFICIAL}
    for row in peers:
        assert row["error"] if record["peers"][row["optimizer"]].startswith("missing") else row["ordinary ms"] > 0


@pytest.mark.slow
def test_the_skipped_gpu_tests_are_not_reported_as_passed(record):
    tests = record["tests"]
    assert tests["outcome"] == "skipped"
    assert tests["passed"] == 0
    assert tests["skipped"] == len(tests["tests"]) > 0
    assert "no CUDA device" in tests["why"]
    assert "Tests marked gpu: skipped" in record["screen"]


@pytest.mark.slow
def test_the_record_says_where_it_comes_from(record):
    assert record["command"].startswith("python -m benchmarks.gpu --device cpu --quick")
    assert record["hardware"]["device"] == "cpu"
    assert record["hardware"]["torch"] == torch.__version__
    assert {"date", "seed", "packages", "skipped"} <= record.keys()
    assert record["exit code"] == 0


def test_without_a_card_it_says_what_to_pass():
    command = [sys.executable, "-m", "benchmarks.gpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pass --device cpu" in done.stderr


def test_a_change_of_the_gradients_beyond_rounding_is_a_disagreement():
    exact = train("GaLore", "fp32", CPU, seed=0)
    assert exact.keys() == SHAPES.keys()
    assert largest_difference(train("GaLore", "fp32", CPU, seed=0, change=1e-3), exact) > BOUNDS["fp32"]


@pytest.mark.parametrize("cell", {cell.model: cell for cell in (*STEP_CELLS, *WHOLE_CELLS)}.values(), ids=str)
def test_the_options_of_every_cell_fit_its_model(cell):
    shapes = llama_shapes(model_config(cell.model))
    parameters = {name: torch.nn.Parameter(torch.empty(shape, device="meta")) for name, shape in shapes.items()}
    for method in METHODS:
        for rank in (128, 512):
            options = method_options(method, rank, 4, state_dtype=cell.state_dtype)
            OPTIMIZERS[method](tagged(parameters), **options).bind()


def test_the_shapes_are_those_of_the_model():
    transformers = pytest.importorskip("transformers")
    config = model_config("60m")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == llama_shapes(config)
    assert parameter_count(llama_shapes(config)) == sum(p.numel() for p in model.parameters())


def test_the_most_important_cells_come_first():
    assert STEP_CELLS[:3] == (Cell("1b", 512), Cell("1b", 512, precision="fp32"), Cell("350m", 128))
    assert len(set(STEP_CELLS)) == len(STEP_CELLS)
    assert {(cell.model, cell.rank, cell.state_dtype) for cell in STEP_CELLS} == {
        (model, rank, dtype) for model in ("60m", "350m", "1b") for rank in (128, 512) for dtype in STATE_DTYPES
    }


def test_without_time_every_cell_is_listed_as_not_measured():
    section = Section("steps", Budget(0.0, {"steps": 1.0}), CPU, 0, True)
    time_cells(section, STEP_CELLS, prepare_step)
    assert not section.rows
    assert [skipped["what"] for skipped in section.skipped] == [str(cell) for cell in STEP_CELLS]


def test_a_cell_that_fails_is_recorded_and_stops_no_other():
    def prepare(section, cell):
        if cell.model == "1b":
            raise torch.OutOfMemoryError("no memory")
        return prepare_step(section, cell)

    section = Section("steps", Budget(60.0, {"steps": 1.0}), CPU, 0, True)
    time_cells(section, [Cell("1b", 128), Cell("tiny", 8)], prepare)
    assert section.skipped[0] == {
        "section": "steps",
        "what": "1b, rank 128, fp32, tf32",
        "why": "OutOfMemoryError: no memory",
    }
    assert {row["optimizer"] for row in section.rows} >= METHODS.keys()


def test_an_optimizer_that_fails_is_dropped_with_its_message():
    def fail():
        raise RuntimeError("no\n kernel")

    contender = Contender("X", fail, step_only, CPU)
    contender.prepare(10.0)
    contender.take_turn(10.0)
    assert contender.error == "RuntimeError: no kernel"
    assert contender.samples == []


class FakeEvent:
    """A CUDA event; consecutive ones are 2 ms apart."""

    count = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.count += 1
        self.at = 2.0 * FakeEvent.count

    def elapsed_time(self, later):
        return later.at - self.at


def test_time_and_memory_on_a_card(monkeypatch):
    """With stand-ins for torch.cuda: 100 bytes before the optimizer, 130 after its first step, 170 at a step's peak."""
    allocated = iter([100, 130, 130])
    for name, stand_in in {
        "Event": FakeEvent,
        "synchronize": lambda device=None: None,
        "memory_allocated": lambda device: next(allocated),
        "max_memory_allocated": lambda device: 170,
        "reset_peak_memory_stats": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    parameter = torch.nn.Parameter(torch.zeros(3))
    contender = Contender("X", lambda: torch.optim.SGD([parameter]), step_only, torch.device("cuda"))
    contender.prepare(10.0)
    contender.take_turn(10.0)
    assert not contender.error
    assert contender.state_bytes == 30
    assert contender.transient_bytes == 40
    assert contender.median_seconds(refreshed=False) == pytest.approx(2e-3)
    assert contender.median_seconds(refreshed=True) is None


def test_what_takes_too_long_is_interrupted():
    with pytest.raises(OutOfTimeError, match="time is used up"), interrupted_after(0.1):
        time.sleep(5)
    with interrupted_after(5.0):
        pass


def test_unused_time_goes_to_the_next_section():
    budget = Budget(100.0, {"a": 1.0, "b": 3.0})
    assert budget.left("a") == pytest.approx(25, abs=1)
    assert budget.left("b") == pytest.approx(100, abs=1)


VERBOSE = """\
tests/gpu/test_steps.py::test_a[GaLore-fp32] PASSED                      [ 25%]
tests/gpu/test_steps.py::test_b FAILED                                   [ 50%]
tests/gpu/test_steps.py::test_c SKIPPED (no apex (or no kernels))        [ 75%]
FAILED tests/gpu/test_steps.py::test_b - AssertionError: 1 is not 2
"""


def test_pytests_output_is_read():
    found = judge(VERBOSE, 1, 60.0)
    assert (found["outcome"], found["passed"], found["failed"], found["skipped"]) == ("failed", 1, 1, 1)
    assert found["tests"][1] == {
        "test": "tests/gpu/test_steps.py::test_b",
        "outcome": "failed",
        "why": "AssertionError: 1 is not 2",
    }
    assert found["tests"][2]["why"] == "no apex (or no kernels)"
    assert judge(VERBOSE.splitlines()[0], 0, 60.0)["outcome"] == "passed"
    assert judge(VERBOSE.splitlines()[2], 0, 60.0)["outcome"] == "skipped"
    assert judge(VERBOSE.splitlines()[0], None, 60.0)["outcome"] == "timed out"
    assert judge("", 5, 60.0)["outcome"] == "not run"


@pytest.mark.parametrize(
    ("tests", "agrees", "code"),
    [("passed", True, 0), ("skipped", True, 0), ("not run", True, 0), ("failed", True, 1), ("timed out", True, 1),
     ("passed", False, 1), ("passed", None, 1)],
)  # fmt: skip
def test_the_exit_code(tests, agrees, code):
    row = {"method": "GaLore", "state_dtype": "fp32", "agrees": agrees, "error": ""}
    sentences, found = verdict({"tests": {"outcome": tests}, "agreement": [row]})
    assert found == code
    assert all(sentence.startswith("FAILED") == bool(code) for sentence in sentences)
