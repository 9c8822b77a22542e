"""What is refused before anything is built."""

import json
from dataclasses import asdict

import pytest

from ds_lowrank.checkpoint.manifest import Progress, seal, write_manifest
from ds_lowrank.errors import CheckpointError
from ds_lowrank.training.arguments import parse
from ds_lowrank.training.output import AlreadyFinishedError, is_new, record_save, saved_in
from ds_lowrank.training.plan import make_plan
from tests.training.runs import Workspace, deepspeed_config


def record(step):
    """A line of metrics.jsonl."""
    return (
        json.dumps({"step": step, "tokens": 8, "skipped_steps": 0, "seconds": 1.0, "memory_gib": 0.1, "loss": 2.0})
        + "\n"
    )


def plan(workspace, output, *more, config=None, ranks=2, steps=6):
    return make_plan(parse([*workspace.arguments(output, config=config, steps=steps), *more]), ranks)


def test_the_command_line_wins_over_the_json(workspace):
    made = plan(workspace, "a", "--lr", "0.5", "--global-batch-size", "12", "--micro-batch-size", "3", "--seed", "7")
    assert (made.batch.total, made.batch.micro, made.batch.accumulation) == (12, 3, 2)
    assert made.config["optimizer"]["params"] == {"lr": 0.5, "rank": 8, "update_proj_gap": 2, "seed": 7}
    assert made.tokens_per_step == 12 * 32
    assert made.warmup == 1  # a tenth of 6 steps, rounded
    assert made.checkpoint is None


def test_a_seed_of_the_optimizer_itself_stands(workspace):
    config = deepspeed_config()
    config["optimizer"]["params"]["seed"] = 3
    assert plan(workspace, "a", "--seed", "7", config=config).config["optimizer"]["params"]["seed"] == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sequence-length", "65"], "--sequence-length 65 is above max_position_embeddings 64"),
        (["--global-batch-size", "7"], "the batch does not divide"),
        (["--warmup", "7"], "longer than the run of 6 steps"),
        (["--model", "none.json"], "no model configuration at none.json"),
        (["--deepspeed_config", "none.json"], "no DeepSpeed configuration at none.json"),
        (["--resume", "global_step3"], "no checkpoint 'global_step3': it is neither a tag"),
    ],
)
def test_what_cannot_be_honoured_is_refused(workspace, more, message):
    with pytest.raises((ValueError, OSError), match=message):
        plan(workspace, "a", *more)


@pytest.fixture
def saved(workspace, tmp_path):
    """A checkpoint of the run `a` after step 3."""
    checkpoint = tmp_path / "global_step3"
    checkpoint.mkdir()
    (checkpoint / "rank_0.pt").write_bytes(b"state")
    files = {"rank_0.pt": seal(checkpoint / "rank_0.pt")}
    write_manifest(checkpoint, asdict(plan(workspace, "a").identity), Progress(3, 300, 0.5), files)
    return checkpoint


def test_a_checkpoint_of_the_same_run_is_resumed_whatever_the_number_of_steps(workspace, saved):
    assert plan(workspace, "b", "--resume", str(saved), steps=20).checkpoint == saved


def test_other_methods_and_layouts_are_refused(workspace, saved):
    resume = ("--resume", str(saved))
    with pytest.raises(CheckpointError, match="optimizer: the checkpoint has 'GaLore', this run 'AdamW'"):
        plan(workspace, "b", *resume, config=deepspeed_config("AdamW"))
    with pytest.raises(CheckpointError, match="zero_stage: the checkpoint has 2, this run 1"):
        plan(workspace, "b", *resume, config=deepspeed_config(zero_stage=1))
    with pytest.raises(CheckpointError, match="ranks: the checkpoint has 2, this run 4"):
        plan(workspace, "b", *resume, ranks=4)
    with pytest.raises(CheckpointError, match="precision: the checkpoint has 'fp32', this run 'bf16'"):
        plan(workspace, "b", *resume, config=deepspeed_config(bf16={"enabled": True}))
    with pytest.raises(CheckpointError, match="matrix_lr_scale"):
        plan(workspace, "b", *resume, "--matrix-lr-scale", "0.25")
    with pytest.raises(CheckpointError, match="vocab_size = 300, this run vocab_size = 301"):
        other = workspace.path / "other_model.json"
        other.write_text(json.dumps(json.loads((workspace.path / "model.json").read_text()) | {"vocab_size": 301}))
        plan(workspace, "b", *resume, "--model", str(other))


def test_a_run_at_its_last_step_is_resumed_for_its_results_and_not_beyond(workspace, saved):
    assert plan(workspace, "b", "--resume", str(saved), steps=3).checkpoint == saved
    with pytest.raises(ValueError, match="global_step3 is beyond --steps 2: give more --steps"):
        plan(workspace, "b", "--resume", str(saved), steps=2)


def test_resume_starts_a_run_that_never_saved_and_no_other(workspace, saved):
    """The same command line before the first checkpoint, after it, and when the run has finished without one."""
    assert plan(workspace, "c", "--resume").checkpoint is None
    output = workspace.path / "c"
    output.mkdir()
    (output / "metrics.jsonl").write_text(record(2))
    assert plan(workspace, "c").checkpoint is None and plan(workspace, "c", "--resume").checkpoint is None
    (output / "summary.json").write_text('{"finished": true, "step": 6}')
    with pytest.raises(AlreadyFinishedError, match="has finished: it is at --steps 6"):
        plan(workspace, "c", "--resume")
    with pytest.raises(ValueError, match="results of a run that saved no checkpoint"):
        plan(workspace, "c", "--resume", steps=7)
    (output / "summary.json").unlink()
    record_save(output, saved.parent)
    with pytest.raises(ValueError, match=r"already contains a run \(metrics.jsonl\); give another --output"):
        plan(workspace, "c")
    with pytest.raises(ValueError, match=f"nothing to resume.* saved its checkpoints in {saved.parent}: give that"):
        plan(workspace, "c", "--resume")
    assert plan(workspace, "c", "--resume", "--save", str(saved.parent)).checkpoint == saved


def test_a_checkpoint_does_not_continue_the_metrics_of_another_run(workspace, saved, tmp_path):
    output = workspace.path / "e"
    output.mkdir()
    resume = ("--resume", str(saved))
    (output / "metrics.jsonl").write_text(record(9))
    assert plan(workspace, "e", *resume).checkpoint == saved  # an interrupted start, which is kept aside
    assert is_new(output, output / "checkpoints", saved)
    record_save(output, output / "checkpoints")
    with pytest.raises(
        ValueError, match=r"e contains a run that saved its checkpoints in .*e/checkpoints, not that of"
    ):
        plan(workspace, "e", *resume)
    moved = output.rename(workspace.path / "moved")
    assert saved_in(moved) == moved / "checkpoints"
    record_save(moved, saved.parent)
    assert plan(workspace, "moved", *resume, "--save", str(tmp_path / "new_disk")).checkpoint == saved
    assert not is_new(moved, tmp_path / "new_disk", saved)


def test_checkpoints_and_folders_of_others_are_not_touched(workspace, saved):
    with pytest.raises(CheckpointError, match=r"already has checkpoints \(global_step3\)"):
        plan(workspace, "d", "--save", str(saved.parent))
    export = workspace.path / "d" / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="d/export is in the way: this program did not write it"):
        plan(workspace, "d", "--export")
    assert plan(workspace, "d").checkpoint is None
    export.rename(export.with_name(".export.partial"))
    with pytest.raises(FileExistsError, match=r"d/\.export\.partial is in the way"):
        plan(workspace, "d", "--export")


def test_a_missing_configuration_and_bad_numbers_end_in_usage(workspace: Workspace, capsys):
    with pytest.raises(SystemExit):
        parse(["--model", "m.json", "--steps", "1", "--output", "o"])
    assert "required: --deepspeed_config" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse([*workspace.arguments("a"), "--steps", "0"])
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err
    for flag in ("--output", "--save"):
        with pytest.raises(SystemExit):
            parse([*workspace.arguments("a"), flag, ""])
        assert f"argument {flag}: it is empty" in capsys.readouterr().err
