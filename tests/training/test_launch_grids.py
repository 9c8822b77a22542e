"""launch/pretrain.py on a grid of ranks: as one process, resumed bit for bit, refused where it cannot be had."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ds_lowrank.environment.apex import Apex
from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.mpu import as_mpu
from ds_lowrank.training.arguments import parse
from ds_lowrank.training.parallelism import GridShape
from ds_lowrank.training.plan import make_plan
from tests.training.runs import Workspace, deepspeed_config

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4")
GRID = ["--tensor-parallel", "2", "--pipeline-parallel", "2"]
EVALUATE = ["--eval-sequences", "4", "--eval-interval", "3"]
ZERO1 = deepspeed_config(zero_stage=1)
AUTOTP = deepspeed_config(zero_stage=1, tensor_parallel={"autotp_size": 2})


def run(workspace: Workspace, output: str, *more: str, config=ZERO1, ranks=4) -> dict[int, dict]:
    finished = workspace.run_forked([*workspace.arguments(output, config=config), *EVALUATE, *more], ranks)
    assert finished.returncode == 0, finished.stderr
    return workspace.metrics(output)


@pytest.fixture(scope="module")
def one_process(workspace):
    return run(workspace, "one_process", ranks=1)


@pytest.fixture(scope="module")
def on_a_grid(workspace):
    """A run under torchrun itself; the other runs are forked."""
    arguments = [*workspace.arguments("grid", config=ZERO1), *EVALUATE, *GRID, "--save-interval", "3", "--export"]
    finished = workspace.run(arguments, TORCHRUN)
    assert finished.returncode == 0, finished.stderr
    return workspace.metrics("grid")


def assert_close(records, expected):
    assert list(records) == list(expected)
    for step, record in records.items():
        # Six steps of Adam carry rounding errors of 1e-7 to some 1e-5.
        assert record["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4)
        assert record["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-3)
        assert ("eval_loss" in record) is ("eval_loss" in expected[step]) is (step % 3 == 0)
        assert record.get("eval_loss", 0) == pytest.approx(expected[step].get("eval_loss", 0), rel=1e-4)
        for key in ("lr", "tokens", "lowrank/projected_matrices", "lowrank/refreshes", "lowrank/state_bytes"):
            assert record[key] == expected[step][key]
        # A token costs the same FLOPs on every layout, and all ranks share them.
        of_a_token = expected[step]["tflops_per_gpu"] / expected[step]["tokens_per_second_per_gpu"]
        assert record["tflops_per_gpu"] / record["tokens_per_second_per_gpu"] == pytest.approx(of_a_token)
    assert records[1]["grad_norm"] == pytest.approx(expected[1]["grad_norm"], rel=1e-6)


def test_a_grid_trains_like_one_process(one_process, on_a_grid):
    assert_close(on_a_grid, one_process)
    for record in on_a_grid.values():
        assert record["step_seconds"] > 0 and record["refresh_seconds"] > 0
        assert record["forward_seconds"] is record["backward_seconds"] is record["reduce_seconds"] is None


def test_autotp_trains_like_one_process(workspace, one_process):
    records = run(workspace, "autotp", "--export", config=AUTOTP)
    assert_close(records, one_process)
    assert (workspace.path / "autotp" / "export" / "model.safetensors").is_file()


def test_a_resumed_grid_lands_on_the_same_bits(workspace, on_a_grid):
    checkpoint = workspace.path / "grid" / "checkpoints" / "global_step3"
    records = run(workspace, "resumed", *GRID, "--export", "--resume", str(checkpoint))
    assert {step: record["loss"] for step, record in records.items()} == {
        step: record["loss"] for step, record in on_a_grid.items() if step > 3
    }
    whole, resumed = (
        load_file(workspace.path / output / "export" / "model.safetensors") for output in ("grid", "resumed")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("more", "config", "ranks"),
    [(GRID, ZERO1, 4), ([], AUTOTP, 2), ([], deepspeed_config(zero_stage=3), 2)],
    ids=["megatron", "autotp", "zero3"],
)
def test_an_export_goes_on_from_where_it_was(workspace, on_a_grid, more, config, ranks, request):
    model = str(workspace.path / "grid" / "export")
    output = f"continued-{request.node.callspec.id}"
    records = run(workspace, output, "--model", model, "--lr", "0", *more, config=config, ranks=ranks)
    # The same numbers in fp32, on other layouts of them.
    assert records[3]["eval_loss"] == pytest.approx(on_a_grid[6]["eval_loss"], rel=1e-6)


def test_another_grid_goes_on_with_the_same_losses(workspace, on_a_grid):
    checkpoint = str(workspace.path / "grid" / "checkpoints" / "global_step3")
    for config, more in ((ZERO1, ("--tensor-parallel", "2")), (AUTOTP, ())):
        output = f"moved-{len(more)}"
        records = run(workspace, output, "--resume", checkpoint, *more, config=config, ranks=4)
        for step in (4, 5, 6):
            assert records[step]["loss"] == pytest.approx(on_a_grid[step]["loss"], rel=1e-5), step


REFUSED = [
    (["--tensor-parallel", "3"], 4, {}, "4 ranks are not a multiple of tensor-parallel 3 x pipeline-parallel 1 = 3"),
    (["--tensor-parallel", "4"], 4, {}, "num_attention_heads 2 is not a multiple of tensor-parallel 4"),
    (["--pipeline-parallel", "4"], 4, {}, "4 pipeline stages for num_hidden_layers 2"),
    (
        ["--pipeline-parallel", "2"],
        2,
        {"zero_optimization": {"stage": 2}},
        "ZeRO 2 .*stage 0 and 1 with a pipeline",
    ),
    (
        ["--pipeline-parallel", "2"],
        2,
        {"zero_optimization": {"stage": 3}},
        "ZeRO 3 .*stage 0 and 1 with a pipeline",
    ),
    (
        ["--tensor-parallel", "2"],
        2,
        {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
        "bf16 with tensor parallelism at ZeRO 0.*Set zero_optimization.stage to 1",
    ),
    (["--tensor-parallel", "2"], 4, {"tensor_parallel": {"autotp_size": 2}}, "use one of them"),
    ([], 3, {"tensor_parallel": {"autotp_size": 2}}, "3 ranks are not a multiple"),
    (["--sequence-parallel"], 2, {}, "give --tensor-parallel"),
    (["--sequence-parallel", "--tensor-parallel", "2"], 2, {}, "needs a GPU"),
    (["--sequence-parallel", "--tensor-parallel", "2", "--sequence-length", "31"], 2, {}, "31 is not a multiple"),
]


@pytest.mark.parametrize(("more", "ranks", "config", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_a_grid_that_cannot_be_had_is_refused(workspace, more, ranks, config, message):
    arguments = workspace.arguments("refused", config={**ZERO1, **config})
    with pytest.raises(ConfigError, match=message):
        make_plan(parse([*arguments, *more]), ranks)


def forget_megatron(monkeypatch):
    """A submodule that another test has imported would be found without its parent."""
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)


def not_installed(monkeypatch, _):
    forget_megatron(monkeypatch)
    monkeypatch.setitem(sys.modules, "megatron", None)


def from_another_project(monkeypatch, path):
    """The folder of a namespace that others share."""
    (path / "megatron" / "energon").mkdir(parents=True)
    forget_megatron(monkeypatch)
    monkeypatch.setattr(sys, "path", [str(path)])


@pytest.mark.parametrize("hide", [not_installed, from_another_project])
@pytest.mark.parametrize("flag", ["--tensor-parallel", "--pipeline-parallel"])
def test_a_missing_megatron_core_is_named_with_what_to_install(workspace, monkeypatch, tmp_path, hide, flag):
    arguments = parse([*workspace.arguments("refused", config=ZERO1), flag, "2"])
    hide(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match=r"pip install megatron-core==0\.16\.1\. .*autotp_size works without"):
        make_plan(arguments, 2)


def test_an_apex_that_is_not_nvidias_stops_a_grid_at_start(workspace, monkeypatch):
    arguments = workspace.arguments("refused", config=ZERO1)
    monkeypatch.setattr("ds_lowrank.environment.apex.find_apex", lambda: Apex("impostor", "0.9", "/x/apex"))
    for flag in ("--tensor-parallel", "--pipeline-parallel"):
        with pytest.raises(ConfigError, match="/x/apex is not NVIDIA's apex"):
            make_plan(parse([*arguments, flag, "2"]), 2)
    with pytest.raises(ConfigError, match="/x/apex is not NVIDIA's apex"):
        as_mpu(SimpleNamespace(get_tensor_model_parallel_group=None))
    assert make_plan(parse(arguments), 2).grid == GridShape(2)


BAD_STARTS = [
    (3, ["--tensor-parallel", "2"], "3 ranks are not a multiple of tensor-parallel 2"),
    (2, ["--pipeline-parallel", "2", "--model", "/no/such.json"], "no model configuration at /no/such.json"),
]


@pytest.mark.parametrize(("ranks", "more", "message"), BAD_STARTS, ids=["ranks", "model"])
def test_all_ranks_end_and_one_line_says_why(workspace, ranks, more, message):
    finished = workspace.run_forked([*workspace.arguments("bad", config=ZERO1), *more], ranks)
    assert finished.returncode == 1
    (line,) = finished.stderr.splitlines()
    assert message in line


def test_ranks_of_one_model_read_the_same_data():
    shape = GridShape(8, tensor=2, pipeline=2)
    assert shape.data == 2
    assert [shape.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [GridShape(4, autotp=2).data_rank(rank) for rank in range(4)] == [0, 0, 1, 1]


def test_deepspeed_is_not_told_a_global_batch_size_that_it_would_misread(workspace):
    made = make_plan(parse(workspace.arguments("autotp-plan", config=AUTOTP)), 4)
    assert made.batch.total == 8 and made.batch.accumulation == 2
    assert "train_batch_size" not in made.config
    assert json.loads(json.dumps(made.config))["gradient_accumulation_steps"] == 2
