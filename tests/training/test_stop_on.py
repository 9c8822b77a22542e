"""``--stop-on`` in whole runs: which step ends them, what is saved, and that nothing good is lost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks.faults.programs import Running
from tests.training.runs import deepspeed_config

BAD = (6, 7, 8)
"""Steps without a finite loss."""


def checkpoints(output: Path) -> set[str]:
    return {path.name for path in (output / "checkpoints").glob("global_step*")}


def with_bad_steps(rank):
    """Make the losses of some steps NaN, and with them the gradients, as damaged data or a faulty card would."""
    from ds_lowrank.training import train
    from ds_lowrank.training.loop import forward_backward, train_step

    def step(engine, batches, *more):
        number = engine.global_steps + 1
        spoilt = math.nan if number in BAD and rank == 1 else 1.0

        def spoil(engine, losses):
            return forward_backward(engine, [lambda loss=loss: loss() * spoilt for loss in losses])

        with patch("ds_lowrank.training.loop.forward_backward", spoil):
            return train_step(engine, batches, *more)

    patch.object(train, "train_step", step).start()


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_nan_ends_a_run_with_the_last_good_weights_saved_and_it_can_go_on_from_them(workspace, zero_stage):
    more = ["--save-interval", "2", "--keep-checkpoints", "1", "--export"]
    config = deepspeed_config(zero_stage=zero_stage)

    def run(name, *flags, faulty=True):
        arguments = [*workspace.arguments(name, config=config, steps=12), *more, *flags]
        prepare = with_bad_steps if faulty else None
        return Running("pretrain", arguments, 2, workspace.path, prepare).finish(120)

    whole, stopped = f"whole{zero_stage}", f"stopped{zero_stage}"
    assert run(whole).codes == (0, 0)
    ended = run(stopped, "--stop-on", "nan:3")
    assert ended.codes == (1, 1)
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("error: step 8: --stop-on nan:3: the loss has not been finite since step 6"), ended.err
    assert "checkpoints/global_step8 is the newest good checkpoint" in ended.err
    assert "global_step8, with the weights of step 5" in ended.out
    assert checkpoints(workspace.path / stopped) == {"global_step4", "global_step8"}  # nothing was deleted for it
    assert run(stopped, "--resume", faulty=False).codes == (0, 0)
    exported = [(workspace.path / name / "export" / "model.safetensors").read_bytes() for name in (whole, stopped)]
    assert exported[0] == exported[1]
    without, resumed = workspace.metrics(whole), workspace.metrics(stopped)
    for step, record in without.items():
        for key in ("loss", "grad_norm", "grad_norm_ratio", "lowrank/captured_energy", "skipped_steps"):
            assert resumed[step][key] == record[key], (step, key)


@pytest.mark.slow
def test_a_loss_above_its_limit_ends_a_run_and_the_checkpoint_is_from_before(workspace):
    arguments = workspace.arguments("high", config=deepspeed_config("GaLore", 2), steps=40)
    more = ["--lr", "1.0", "--warmup", "20", "--save-interval", "1", "--keep-checkpoints", "1"]
    run = workspace.run_forked([*arguments, *more, "--stop-on", "loss:6:3", "--update-ratio"], ranks=2)
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
    records = workspace.metrics("high")
    above = [step for step, record in records.items() if record["loss"] > 6]
    end = next(step for step in above if {step - 1, step - 2} <= {*above})
    assert max(records) == end  # both ranks stop there, and not before
    lowest = min(record["loss"] for record in records.values())
    assert run.stderr.startswith(
        f"error: step {end}: --stop-on loss:6:3: the loss has been above 6 since step {end - 2}, and is "
        f"{records[end]['loss']:.4g}, after a lowest loss of {lowest:.4g}, and the run was ended; lower the "
    ), run.stderr
    assert f"global_step{end - 3} is the newest good checkpoint" in run.stderr
    assert checkpoints(workspace.path / "high") == {f"global_step{end - 3}"}
    assert all(record["lowrank/update_ratio"] > 0 for record in records.values())


@pytest.mark.slow
def test_a_gradient_norm_far_above_its_average_ends_a_run_also_where_no_wrapper_keeps_it(workspace):
    arguments = workspace.arguments("spike", config=deepspeed_config("AdamW", 0), steps=200)
    more = ["--lr", "10", "--warmup", "150", "--log-interval", "500", "--stop-on", "grad-norm:3"]
    run = workspace.run_forked([*arguments, *more])
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
    assert "--stop-on grad-norm:3: the gradient norm over its moving average has been above 3 since step" in run.stderr
    assert "no checkpoint was saved before" in run.stderr


@pytest.mark.slow
def test_a_bad_condition_ends_every_program_at_once_in_one_line(workspace):
    run = workspace.run_forked([*workspace.arguments("refused"), "--stop-on", "loss=3"], ranks=2)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].endswith("a gradient norm above X times its moving average)")
    assert "argument --stop-on: 'loss=3' is no condition" in run.stderr
    assert not (workspace.path / "refused").exists()


def test_records_say_what_is_not_known(workspace):
    """A gradient norm has no average before the first one, and AdamW has no bases."""
    run = workspace.run_forked(workspace.arguments("adamw", config=deepspeed_config("AdamW", 1), steps=2))
    assert run.returncode == 0, run.stderr
    first, second = (json.loads(line) for line in (workspace.path / "adamw" / "metrics.jsonl").read_text().splitlines())
    assert first["grad_norm_ratio"] is None
    assert second["grad_norm_ratio"] == pytest.approx(second["grad_norm"] / first["grad_norm"])
    for key in ("captured_energy", "least_captured_energy", "update_ratio"):
        assert first[f"lowrank/{key}"] is second[f"lowrank/{key}"] is None
