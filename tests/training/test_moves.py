"""Runs that resume on other ranks, with another optimizer or with other data."""

from __future__ import annotations

import json

import pytest

from tests.training.runs import Workspace, deepspeed_config


@pytest.fixture(scope="module")
def whole(workspace: Workspace) -> dict[int, dict[str, float]]:
    """Six steps at ZeRO 2 on two ranks, with checkpoints after the third and the last."""
    run = workspace.run_forked([*workspace.arguments("moving"), "--save-interval", "3"], 2)
    assert run.returncode == 0, run.stderr
    return workspace.metrics("moving")


def resume(workspace: Workspace, output: str, ranks: int, *more: str, config=None):
    checkpoint = workspace.path / "moving" / "checkpoints" / "global_step3"
    arguments = [*workspace.arguments(output, config=config), "--resume", str(checkpoint), *more]
    return workspace.run_forked(arguments, ranks)


@pytest.mark.parametrize(
    ("stage", "ranks", "flags"),
    [(0, 1, []), (3, 4, []), (1, 2, ["--tensor-parallel", "2"]), (1, 4, ["--pipeline-parallel", "2"])],
)
def test_a_run_goes_on_where_it_was_on_other_ranks(workspace, whole, stage, ranks, flags):
    config = deepspeed_config(zero_stage=stage)
    config["train_micro_batch_size_per_gpu"] = 1
    name = f"moved-{stage}-{ranks}"
    run = resume(workspace, name, ranks, *flags, config=config)
    assert run.returncode == 0, run.stderr
    moved = workspace.metrics(name)
    assert list(moved) == [4, 5, 6]
    for step, record in moved.items():
        # A pipeline evaluates full batches only, and so other sequences.
        keys = (
            {"loss", "grad_norm", "lr"} if "--pipeline-parallel" in flags else {"loss", "grad_norm", "lr", "eval_loss"}
        )
        for key in keys & record.keys():
            assert record[key] == pytest.approx(whole[step][key], rel=2e-5), (step, key)
        assert record["tokens"] == whole[step]["tokens"]


def other_optimizer(**params):
    config = deepspeed_config()
    config["optimizer"]["params"] |= params
    return config


@pytest.mark.parametrize(
    ("kept", "config", "said"),
    [
        ("settings", other_optimizer(lr=0.02), "its state, with the options of this run"),
        ("projected", other_optimizer(rank=4), "the moments of what AdamW steps, and begins anew with the matrices"),
        ("all", other_optimizer(rank=4), "nothing, and begins anew"),
        ("all", deepspeed_config("AdaRankGrad"), "nothing, and begins anew"),
    ],
)
def test_another_optimizer_needs_a_flag_that_says_what_is_kept(workspace, whole, kept, config, said):
    refused = resume(workspace, "refused-optimizer", 1, config=config)
    assert refused.returncode == 1 and "belongs to a different run; nothing was changed. optimizer" in refused.stderr
    name = f"reset-{kept}-{config['optimizer']['type']}"
    run = resume(workspace, name, 1, "--reset-optimizer", kept, config=config)
    assert run.returncode == 0, run.stderr
    checkpoint = workspace.path / "moving" / "checkpoints" / "global_step3"
    assert f"of {checkpoint} the optimizer keeps {said}" in run.stderr + run.stdout
    found = workspace.metrics(name)
    assert list(found) == [4, 5, 6]
    # The loss of the first step is that of the same weights on the same batch, at the rate of its step.
    assert found[4]["loss"] == pytest.approx(whole[4]["loss"], rel=2e-5)
    factor = config["optimizer"]["params"]["lr"] / 0.01
    assert [record["lr"] for record in found.values()] == pytest.approx([factor * whole[step]["lr"] for step in found])


def test_a_reset_run_that_is_resumed_with_the_same_command_keeps_its_own_state(workspace, whole):
    config = other_optimizer(rank=2)
    arguments = ["--reset-optimizer", "--save-interval", "1", "--keep-checkpoints", "9"]
    assert resume(workspace, "reset-twice", 1, *arguments, config=config).returncode == 0
    folder = workspace.path / "reset-twice" / "checkpoints"
    metrics = workspace.metrics("reset-twice")
    last = folder / "global_step6"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    again = resume(workspace, "reset-twice", 1, *arguments, config=config)
    assert again.returncode == 0, again.stderr
    assert "the optimizer keeps" not in again.stderr + again.stdout
    assert workspace.metrics("reset-twice")[6]["loss"] == metrics[6]["loss"]


def test_other_data_need_a_flag(workspace, whole):
    other = workspace.path / "other-text"
    other.mkdir(exist_ok=True)
    for number in range(100):
        (other / f"{number}.txt").write_text(" ".join(f"{(number * step + 1) % 97}" for step in range(150)))
    refused = resume(workspace, "refused-data", 1, "--data", str(other))
    assert refused.returncode == 1 and "fingerprint" in refused.stderr
    run = resume(workspace, "reset-data", 1, "--data", str(other), "--reset-data")
    assert run.returncode == 0, run.stderr
    assert list(workspace.metrics("reset-data")) == [4, 5, 6]


def test_a_new_run_starts_from_another_ones_weights(workspace, whole):
    """The first loss is that of the saved weights on the first batch; what AdamW steps goes on with its moments."""
    saved = workspace.path / "moving" / "checkpoints" / "global_step6"
    run = workspace.run_forked([*workspace.arguments("started", steps=2), "--start-from", str(saved)], 2)
    assert run.returncode == 0, run.stderr
    started = workspace.metrics("started")
    assert list(started) == [1, 2] and started[1]["loss"] < whole[4]["loss"] < whole[1]["loss"]
    adamw = workspace.arguments("started-adamw", config=deepspeed_config("AdamW"))
    refused = workspace.run_forked([*adamw, "--start-from", str(saved)], 1)
    assert refused.returncode == 1 and "give the exported weights as --model" in refused.stderr


def test_a_reset_without_resume_is_refused(workspace):
    run = workspace.run_forked([*workspace.arguments("reset-alone"), "--reset-optimizer"], 1)
    assert run.returncode == 2 and "--reset-optimizer says what --resume keeps: give --resume too" in run.stderr


def test_a_synchronous_save_is_the_same_checkpoint(workspace, whole):
    run = workspace.run_forked([*workspace.arguments("waiting"), "--save-interval", "3", "--synchronous-save"], 2)
    assert run.returncode == 0, run.stderr
    for step in (3, 6):
        one, two = (
            json.loads((workspace.path / name / "checkpoints" / f"global_step{step}" / "manifest.json").read_text())
            for name in ("moving", "waiting")
        )
        for rank in (0, 1):
            name = f"rank_{rank:05d}.safetensors"
            assert one["files"][name] == two["files"][name]
