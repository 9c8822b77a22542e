"""What launch/slurm/pretrain.sbatch asks of Slurm, with stand-ins for its commands that note how they were called."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_lowrank.training import arguments as pretrain
from tests.slurm.cluster import SCRIPT
from tests.unit.pages import PAGES, ROOT, rows

COMMANDS = {
    "srun": 'printf "%s\\n" "$@" > "$CALLS/srun"; env > "$CALLS/environment"; eval "${WAITS:-}"; exit ${SRUN_CODE:-0}',
    "scancel": 'echo "$@" >> "$CALLS/scancel"',
    "scontrol": 'echo "$@" >> "$CALLS/scontrol"; [[ $1 != show ]] || printf "node7\\nnode8\\n"; exit ${CODE:-0}',
    "getent": "[[ $1 == ahosts && $2 != nowhere ]]",
    "squeue": 'echo "${STATE-RUNNING}"',
}
SBATCH = {"--nodes", "--gpus-per-node", "--cpus-per-task", "--time"}
JOB = {"SLURM_JOB_ID": "54321", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}


class Job:
    """A job whose batch script has ended.

    Attributes:
        code: its exit code.
        log: what it has printed.
        srun: the words that srun was given, without the functions that the nodes run.
        scontrol, scancel: their calls.
        exported: the environment that srun had.
    """

    def __init__(self, folder: Path, arguments: tuple[str, ...], signalled: bool, variables: dict[str, str]) -> None:
        (folder / "bin").mkdir()
        for name, text in COMMANDS.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (folder / "bin" / name).chmod(0o755)
        (folder / "launch").mkdir()
        for name in ("pretrain.py", "finetune.py"):
            (folder / "launch" / name).touch()
        environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "CALLS": str(folder), **JOB, **variables}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        shell = subprocess.Popen(["bash", SCRIPT, *arguments], cwd=folder, env=environment, text=True, **streams)
        if signalled:
            while not (folder / "environment").exists():
                time.sleep(0.05)
            shell.terminate()
        self.log, errors = shell.communicate(timeout=60)
        self.code = shell.returncode
        assert not errors

        def calls(name: str) -> str:
            return (folder / name).read_text() if (folder / name).exists() else ""

        self.srun = re.sub(r"\nwait_for \(\).*\n}; ", "\nFUNCTIONS; ", calls("srun"), flags=re.S).splitlines()
        self.scontrol, self.scancel = calls("scontrol"), calls("scancel")
        self.exported = calls("environment").splitlines()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Job]:
    return lambda *arguments, signalled=False, **variables: Job(tmp_path, arguments, signalled, variables)


NODE = ["bash", "-c", 'FUNCTIONS; on_each_node "$@"', "on_each_node"]
OPTIONS = ["--ntasks-per-node=1", "--cpu-bind=none", "--wait=60", "--kill-on-bad-exit=0"]
LOGS = ["--output=slurm-54321-%N.log", "--open-mode=append"]


def test_without_a_container(run):
    job = run("--steps", "10", "--output", "a folder")
    program = ["launch/pretrain.py", "--steps", "10", "--output", "a folder", "--resume"]
    assert job.srun == [*OPTIONS, *LOGS, *NODE, *program]
    assert {"MASTER_ADDR=node7", "MASTER_PORT=20321", "RESTARTS=0"} <= set(job.exported)
    assert (job.code, job.log.splitlines()[-1][20:]) == (0, "finished")
    assert "job 54321 on node[7-8], start 1: ranks meet at node7:20321" in job.log
    assert "requeue" not in job.scontrol


def test_in_a_container(run, tmp_path):
    job = run("--steps", "10", CONTAINER_IMAGE="/images/ds lowrank.sqsh")
    container = ["--container-image=/images/ds lowrank.sqsh", f"--container-mounts={tmp_path}:{tmp_path}"]
    container += [f"--container-workdir={tmp_path}", "--no-container-mount-home"]
    assert job.srun == [*OPTIONS, *LOGS, *container, *NODE, "launch/pretrain.py", "--steps", "10", "--resume"]


def test_in_a_container_with_folders_of_its_own(run):
    folders = {"CONTAINER_MOUNTS": "/data:/data:ro,/runs:/runs", "CONTAINER_WORKDIR": "/workspace"}
    job = run(CONTAINER_IMAGE="registry#image:tag", PROGRAM="only/in_the_image.py", **folders)
    assert job.srun[-2:] == ["only/in_the_image.py", "--resume"]
    assert "--container-mounts=/data:/data:ro,/runs:/runs" in job.srun
    assert "--container-workdir=/workspace" in job.srun


def test_the_variables(run):
    variables = {"PROGRAM": "launch/finetune.py", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29400"}
    job = run("--resume", "runs/other", **variables)
    assert job.srun[-3:] == ["launch/finetune.py", "--resume", "runs/other"]
    assert "start 1: ranks meet at 10.0.0.7:29400" in job.log


def test_a_folder_that_is_no_checkout_is_refused(run, tmp_path):
    job = run(PROGRAM="launch/other.py")
    assert job.code == 2 and not job.srun
    assert f"error: there is no launch/other.py in {tmp_path}: submit from the checkout, or with --chdir" in job.log


def test_a_name_without_an_address_is_refused(run):
    job = run(MASTER_ADDR="nowhere")
    assert job.code == 2 and not job.srun
    assert "error: the name nowhere has no address here: set MASTER_ADDR to an address of the first node" in job.log


@pytest.mark.parametrize(
    ("variables", "requeued", "said"),
    [
        ({}, True, "stopped: requeued, to continue"),
        ({"SLURM_RESTART_COUNT": "99"}, True, "stopped: requeued, to continue"),
        ({"SLURM_RESTART_COUNT": "100"}, False, "not requeued: it was 100 times, and MAX_RESTARTS is 100"),
        ({"SLURM_RESTART_COUNT": "2", "MAX_RESTARTS": "2"}, False, "it was 2 times, and MAX_RESTARTS is 2"),
        ({"STATE": "COMPLETING"}, False, "stopped: Slurm has ended the job, so it is not requeued from here"),
        ({"STATE": ""}, False, "stopped: Slurm has ended the job, so it is not requeued from here"),
    ],
)
def test_a_job_that_was_asked_to_stop_is_requeued_so_often(run, variables, requeued, said):
    job = run(SRUN_CODE="143", **variables)
    assert said in job.log and job.code == 143
    assert ("requeue 54321" in job.scontrol) == requeued


def test_a_job_that_cannot_be_requeued_says_so(run):
    job = run(SRUN_CODE="143", CODE="1")
    assert "error: it cannot be requeued here; the same command continues the run" in job.log and job.code == 143


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_job_that_fails_keeps_its_exit_code_and_is_not_requeued(run, code):
    job = run(SRUN_CODE=str(code))
    assert job.code == code and "requeue" not in job.scontrol
    assert f"failed with exit code {code}, and not requeued: slurm-54321-*.log say why" in job.log


@pytest.mark.parametrize(("state", "passed_on"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_signal_to_the_batch_shell_alone_is_passed_on_but_not_the_end_of_the_job(run, state, passed_on):
    waits = "for i in {1..100}; do [[ ! -e $CALLS/scancel ]] || break; sleep 0.02; done"
    job = run(signalled=True, WAITS=waits, SRUN_CODE="143", STATE=state)
    assert job.scancel == ("--signal=TERM 54321\n" if passed_on else "")
    assert ("requeue 54321" in job.scontrol) == passed_on


def test_the_script_is_sound():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: only the syntax was checked")
    found = subprocess.run(["shellcheck", SCRIPT], text=True, capture_output=True)
    assert found.returncode == 0, found.stdout


def test_every_variable_is_documented():
    text = SCRIPT.read_text()
    read = set(re.findall(r"\$\{([A-Z_]+):[-=]", text))
    ours = {name for name in read if not name.startswith(("SLURM_", "TORCH_"))}
    assert ours == set(re.findall(r"^#   ([A-Z_]+) ", text, re.M))
    assert ours == {name.strip("`") for name, *_ in rows("cluster", "### Variables of the script")}


def submissions() -> list[tuple[int, list[str]]]:
    """The commands of docs/cluster.md that submit a job, each with the number of commands in its block up to it."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGES["cluster"], re.M | re.S):
        commands = block.replace("\\\n", " ").splitlines()
        found += [(i + 1, shlex.split(text)) for i, text in enumerate(commands) if "pretrain.sbatch" in text]
    return found


def test_four_commands_lead_to_a_first_step_and_all_that_are_documented_parse():
    assert submissions()[0][0] <= 4
    assert len(submissions()) == 3
    for _, (command, *words) in submissions():
        split = words.index("launch/slurm/pretrain.sbatch")
        arguments = pretrain.parse(words[split + 1 :])
        assert command == "sbatch" and set(words[:split:2]) <= SBATCH
        assert Path(ROOT, arguments.deepspeed_config).is_file() and Path(ROOT, arguments.model).is_file()
