"""launch/slurm/pretrain.sbatch on a real cluster: Slurm's own daemons, two nodes, on this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.training.runs import ROOT, Workspace
from tests.training.test_requeue import values

pytestmark = pytest.mark.slow

PROGRAM = str(ROOT / "tests" / "slurm" / "program.py")
STEPS = 60
"""Enough that the signal arrives before the last: a step takes at least 10 ms, and the signal a few hundred."""


def reports(folder: Path, start: int) -> list[dict[str, object]]:
    """What the ranks of a start of the job have reported, by rank."""
    found = [json.loads(path.read_text()) for path in folder.glob(f"{start}-*.json")]
    return sorted(found, key=lambda report: report["RANK"])


def test_a_preempted_job_comes_back_and_ends_as_if_nothing_had_been(cluster: Cluster, tmp_path: Path):
    workspace = Workspace.make(tmp_path)
    whole = workspace.run_forked(workspace.arguments("whole", steps=STEPS), ranks=2)
    assert whole.returncode == 0, whole.stderr

    job = cluster.submit("--nodes=2", arguments=workspace.arguments("preempted", steps=STEPS))
    metrics = tmp_path / "preempted" / "metrics.jsonl"
    cluster.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, 240, job)
    urgent = cluster.run("sbatch", "--parsable", "--partition=high", "--output=/dev/null", "--wrap=sleep 1")
    cluster.wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", 60, job)
    at_stop = metrics.read_text().count("\n")
    assert 1 < at_stop < STEPS, "the job was stopped after its last step: the test tests nothing"
    ended = cluster.wait_for_end(job, 300)

    log = cluster.logs(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    assert "on n[1-2], start 1: ranks meet at 127.0.0.1:" in log and "start 2" in log
    assert "stopped: requeued, to continue" in log and "finished" in log
    assert f"asked to stop at step {at_stop} of {STEPS}; --resume continues from here" in log
    # torchrun's agents meet once more at the end. One that comes when the agent with the store has left logs an
    # exception of its own, and goes on.
    said = "\n".join(line for line in log.splitlines() if "elastic/agent/server/api.py" not in line)
    assert "Traceback" not in said and "Killed" not in log
    for result in ("metrics.jsonl", "summary.json"):
        assert values(tmp_path / "preempted", result) == values(tmp_path / "whole", result), result


def test_each_gpu_has_a_rank_and_a_job_that_fails_is_not_requeued(cluster: Cluster, tmp_path: Path):
    options = ("--nodes=2", "--gpus-per-node=2")
    job = cluster.submit(*options, arguments=["fail", str(tmp_path), "--steps", "two words"], PROGRAM=PROGRAM)
    ended = cluster.wait_for_end(job, 90)
    log = cluster.logs(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0"), log
    assert "failed with exit code 1, and not requeued" in log
    found = reports(tmp_path, 0)
    assert [report["RANK"] for report in found] == [0, 1, 2, 3]
    assert [report["LOCAL_RANK"] for report in found] == [0, 1, 0, 1]
    assert sorted(report["SLURM_NODEID"] for report in found) == [0, 0, 1, 1]
    assert {report["WORLD_SIZE"] for report in found} == {4}
    assert all(report["arguments"][2:] == ["--steps", "two words", "--resume"] for report in found)


def test_a_job_that_is_asked_before_its_ranks_exist_comes_back_and_one_that_is_cancelled_does_not(cluster, tmp_path):
    hasty = {"PROGRAM": PROGRAM, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}  # seconds, if torchrun minded the signal
    job = cluster.submit("--nodes=2", arguments=["wait", str(tmp_path)], **hasty)
    cluster.wait_for(lambda: "ranks meet" in cluster.logs(job), 30, job)
    time.sleep(0.5)  # torchrun is importing torch
    assert not reports(tmp_path, 0)
    cluster.run("scancel", "--signal=TERM", job)
    cluster.wait_for(lambda: len(reports(tmp_path, 1)) == 2, 90, job)
    assert not reports(tmp_path, 0), "the ranks started although the job had been asked to stop"

    cluster.run("scancel", job)
    ended = cluster.wait_for_end(job, 60)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "1"), cluster.logs(job)
    assert "stopped: Slurm has ended the job" in cluster.logs(job)
    assert len(list(tmp_path.glob("1-*.saved"))) == 2, "the ranks were ended before they had saved"
