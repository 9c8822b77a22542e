"""One command line with ``--resume``, started again after a kill at any moment, ends in the same result."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from benchmarks.faults.one_rank import raises
from benchmarks.faults.one_rank import workspace as small_run
from benchmarks.faults.programs import Running
from ds_lowrank.training.lock import Lock
from tests.training import forked_script
from tests.training.finetuning import command_line, make_workspace
from tests.training.runs import ROOT, TIMEOUT, Workspace

RESULTS = ("metrics.jsonl", "summary.json", "export/model.safetensors")


@pytest.fixture(scope="module")
def whole(workspace: Workspace) -> Path:
    """The output of a run that was never interrupted."""
    arguments = [*workspace.arguments("never_killed"), "--save-interval", "3", "--export", "--resume"]
    run = workspace.run_forked(arguments, ranks=2)
    assert run.returncode == 0, run.stderr
    assert "has no checkpoint to resume: starting from the beginning" in run.stdout
    return workspace.path / "never_killed"


def values(output: Path, name: str) -> object:
    """A result, without the times and the memory that differ between two runs."""
    if name.endswith("safetensors"):
        return (output / name).read_bytes()
    records = (
        [json.loads(line) for line in (output / name).read_text().splitlines()]
        if "jsonl" in name
        else [json.loads((output / name).read_text())]
    )
    measured = ("second", "per_gpu", "projected_end", "gib")
    return [{k: v for k, v in r.items() if not any(word in k for word in measured)} for r in records]


def killed_before_the_first_checkpoint(output: Path) -> None:
    metrics = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    shutil.rmtree(output)
    output.mkdir()
    (output / "metrics.jsonl").write_text("".join(metrics[:2]) + metrics[2][:20])


def killed_after_the_first_checkpoint(output: Path) -> None:
    killed_after_the_last_checkpoint(output)
    shutil.rmtree(output / "checkpoints" / "global_step6")
    (output / ".checkpoints").unlink()  # it is written after the checkpoint


def killed_after_the_last_checkpoint(output: Path) -> None:
    shutil.rmtree(output / "export")
    (output / "summary.json").unlink()
    (output / "loss.png").unlink()


def killed_while_exporting(output: Path) -> None:
    (output / "export").rename(output / ".export.partial")
    killed = output / "checkpoints" / ".global_step3.removed"
    (output / "checkpoints" / "global_step3").rename(killed)
    (killed / ".ds_lowrank").write_text("")


def killed_at_the_very_end(output: Path) -> None:
    del output


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        killed_before_the_first_checkpoint,
        killed_after_the_first_checkpoint,
        killed_after_the_last_checkpoint,
        killed_while_exporting,
        killed_at_the_very_end,
    ],
)
def test_the_same_command_line_ends_in_the_same_result(workspace, whole, kill):
    name = kill.__name__
    output = workspace.path / name
    shutil.copytree(whole, output)
    kill(output)
    arguments = [*workspace.arguments(name), "--save-interval", "3", "--export", "--resume"]
    run = workspace.run_forked(arguments, ranks=2)
    assert run.returncode == 0, run.stderr
    for result in RESULTS:
        assert values(output, result) == values(whole, result), result
    assert (output / "loss.png").is_file()
    found = {path.name for path in output.iterdir()} - {path.name for path in whole.iterdir()}
    assert found == ({"metrics.1.jsonl"} if kill is killed_before_the_first_checkpoint else set())
    assert ("at the last step: only the results are written again" in run.stdout) == ("first" not in name)


def test_a_run_that_never_saved_is_started_again_without_resume_too(workspace, whole):
    output = workspace.path / "again"
    shutil.copytree(whole, output)
    killed_before_the_first_checkpoint(output)
    run = workspace.run_forked([*workspace.arguments("again"), "--save-interval", "0", "--export"], ranks=2)
    assert run.returncode == 0, run.stderr
    for result in RESULTS:
        assert values(output, result) == values(whole, result), result
    finished = workspace.run_forked([*workspace.arguments("again"), "--save-interval", "0", "--resume"], ranks=2)
    assert finished.returncode == 0 and "again has finished: it is at --steps 6" in finished.stdout


def test_a_folder_in_use_and_one_that_cannot_be_written_end_in_one_line(workspace, whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    held = Lock(whole / "checkpoints")
    run = workspace.run_forked([*workspace.arguments("never_killed"), "--resume"], ranks=2)
    held.release()
    assert run.returncode == 1 and "checkpoints is in use by another run (process" in run.stderr
    assert "Traceback" not in run.stderr
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    (workspace.path / "a_file").write_text("")
    run = workspace.run_forked([*workspace.arguments("x"), "--output", str(workspace.path / "a_file")], ranks=2)
    assert run.returncode == 1 and "a_file cannot be written (it is not a folder)" in run.stderr
    assert "Traceback" not in run.stderr


def as_torchrun_does(port, restart, rank):
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restart)
    if not restart and rank == 1:
        raises("ds_lowrank.training.train:train_step", OSError("a fault of the node"), 5, 1, rank)


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_find_each_other_and_not_the_dead(tmp_path):
    """``torchrun --max-restarts`` keeps the store through which the ranks exchange their addresses."""
    folder = tmp_path / "work"
    folder.mkdir()
    arguments = small_run(folder, 6, "--save-interval", "3", "--resume", "--timeout", "20", "--setup-timeout", "20")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for restart, codes in ((0, (1, 1)), (1, (0, 0))):
        prepare = functools.partial(as_torchrun_does, store.port, restart)
        assert Running("pretrain", arguments, 2, folder, prepare).finish(60).codes == codes
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_fine_tuning_at_its_last_step_keeps_its_best_model(tmp_path):
    folder = make_workspace(tmp_path)
    rates = {"warmup_min_lr": 1e-3, "warmup_max_lr": 1.0, "warmup_num_steps": 8, "warmup_type": "linear"}
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "GaLore", "params": {"lr": 1e-2, "rank": 8, "update_proj_gap": 2}},
        "zero_optimization": {"stage": 2},
        "scheduler": {"type": "WarmupLR", "params": rates},
    }
    more = ("--eval-interval", "1", "--best-metric", "loss", "--save-interval", "4", "--export", "--resume")
    arguments = command_line(folder, "tuned", *more, config=config)

    def run():
        found = forked_script.run_script(ROOT / "launch" / "finetune.py", arguments, 2, folder, TIMEOUT)
        assert found.returncode == 0, found.stderr

    run()
    output = folder / "tuned"
    results = (*RESULTS, "best/best.json", "best/model.safetensors")
    first = {name: values(output, name) for name in results}
    assert 1 < first["best/best.json"][0]["step"] < 8, "the best is the first or the last: the test tests nothing"
    killed_after_the_last_checkpoint(output)
    run()
    assert {name: values(output, name) for name in results} == first
