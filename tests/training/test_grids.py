"""launch/pretrain.py on a grid of ranks: as one process, resumed bit for bit, refused where it cannot be had."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ds_lowrank.errors import ConfigError
from ds_lowrank.training.arguments import parse
from ds_lowrank.training.layout import GridShape
from ds_lowrank.training.plan import make_plan
from tests.training.runs import Workspace, deepspeed_config

FOUR = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4")
GRID = ["--tensor-parallel", "2", "--pipeline-parallel", "2"]
EVALUATED = ["--eval-sequences", "4", "--eval-interval", "3"]
ZERO1 = deepspeed_config(zero_stage=1)
AUTOTP = deepspeed_config(zero_stage=1, tensor_parallel={"autotp_size": 2})


def run(workspace: Workspace, output: str, *more: str, config=ZERO1, ranks=4) -> dict[int, dict]:
    finished = workspace.run_warm([*workspace.arguments(output, config=config), *EVALUATED, *more], ranks)
    assert finished.returncode == 0, finished.stderr
    return workspace.metrics(output)


@pytest.fixture(scope="module")
def alone(workspace):
    return run(workspace, "alone", ranks=1)


@pytest.fixture(scope="module")
def on_a_grid(workspace):
    """By torchrun itself, which the other runs only resemble."""
    arguments = [*workspace.arguments("grid", config=ZERO1), *EVALUATED, *GRID, "--save-interval", "3", "--export"]
    finished = workspace.run(arguments, FOUR)
    assert finished.returncode == 0, finished.stderr
    return workspace.metrics("grid")


def close_to(records, expected):
    assert list(records) == list(expected)
    for step, record in records.items():
        # Six steps of Adam carry rounding errors of 1e-7 to some 1e-5.
        assert record["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4)
        assert record["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-3)
        assert ("eval_loss" in record) is ("eval_loss" in expected[step]) is (step % 3 == 0)
        assert record.get("eval_loss", 0) == pytest.approx(expected[step].get("eval_loss", 0), rel=1e-4)
        for key in ("lr", "tokens", "lowrank/projected_matrices", "lowrank/refreshes", "lowrank/state_bytes"):
            assert record[key] == expected[step][key]
    assert records[1]["grad_norm"] == pytest.approx(expected[1]["grad_norm"], rel=1e-6)


def test_a_grid_trains_like_one_process(alone, on_a_grid):
    close_to(on_a_grid, alone)


def test_autotp_trains_like_one_process(workspace, alone):
    records = run(workspace, "autotp", "--export", config=AUTOTP)
    close_to(records, alone)
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


def test_another_grid_does_not_resume_it(workspace, on_a_grid):
    checkpoint = str(workspace.path / "grid" / "checkpoints" / "global_step3")
    arguments = [*workspace.arguments("other", config=ZERO1), "--resume", checkpoint, "--tensor-parallel", "2"]
    with pytest.raises(ValueError, match="pipeline_parallel: the checkpoint has 2, this run 1"):
        make_plan(parse(arguments), 4)


REFUSED = [
    (["--tensor-parallel", "3"], 4, {}, "4 ranks are no multiple of tensor-parallel 3 x pipeline-parallel 1 = 3"),
    (["--tensor-parallel", "4"], 4, {}, "num_attention_heads 2 is no multiple of tensor-parallel 4"),
    (["--pipeline-parallel", "4"], 4, {}, "4 pipeline stages for num_hidden_layers 2"),
    (["--pipeline-parallel", "2"], 2, {"zero_optimization": {"stage": 2}}, "ZeRO 2 with --pipeline-parallel 2"),
    (["--pipeline-parallel", "2"], 2, {"zero_optimization": {"stage": 3}}, "ZeRO 3 with --pipeline-parallel 2"),
    (
        ["--tensor-parallel", "2"],
        2,
        {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
        "bf16 with tensor parallelism at ZeRO 0.*set zero_optimization.stage to 1",
    ),
    (["--tensor-parallel", "2"], 4, {"tensor_parallel": {"autotp_size": 2}}, "use one of them"),
    ([], 3, {"tensor_parallel": {"autotp_size": 2}}, "3 ranks are no multiple"),
    (["--sequence-parallel"], 2, {}, "give --tensor-parallel"),
    (["--sequence-parallel", "--tensor-parallel", "2"], 2, {}, "needs a GPU"),
    (["--sequence-parallel", "--tensor-parallel", "2", "--sequence-length", "31"], 2, {}, "31 is no multiple"),
]


@pytest.mark.parametrize(("more", "ranks", "config", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_a_grid_that_cannot_be_had_is_refused(workspace, more, ranks, config, message):
    arguments = workspace.arguments("refused", config={**ZERO1, **config})
    with pytest.raises(ConfigError, match=message):
        make_plan(parse([*arguments, *more]), ranks)


def test_a_missing_megatron_core_is_named_with_what_to_install(workspace, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ds_lowrank\[megatron\]'.*autotp_size works without"):
        make_plan(parse([*workspace.arguments("refused", config=ZERO1), "--tensor-parallel", "2"]), 2)


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
