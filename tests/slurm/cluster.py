"""A Slurm cluster of two nodes on this machine, from the distribution's packages, in a folder of its own."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.training.runs import ROOT

SCRIPT = ROOT / "launch" / "slurm" / "pretrain.sbatch"
DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NODES = ("n1", "n2")

# Two GPUs a node, which are empty files. A requeued job may start again after cred_expire seconds, and 5 is
# the least; a cluster's default is 120.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def why_not() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    absent = [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name, path=PATH) is None]
    return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)" if absent else None


def free_ports(number: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Cluster:
    """The daemons of two nodes, and jobs on them.

    Args:
        folder: for sockets, logs and state, with a short path; must not exist.
        work: the folder in which jobs run. It gets what a checkout has: launch/ and an environment.
    """

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work = folder, work
        self._daemons: list[subprocess.Popen[bytes]] = []
        (folder / "state").mkdir(parents=True)
        (work / "launch").symlink_to(ROOT / "launch")
        (work / ".venv").symlink_to(sys.prefix)
        port, *node_ports = free_ports(1 + len(NODES))
        host = socket.gethostname()
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=4 Gres=gpu:2\n"
            for name, node_port in zip(NODES, node_ports, strict=True)
        ]
        text = CONFIGURATION.format(folder=folder, host=host, port=port) + "".join(nodes)
        (folder / "slurm.conf").write_text(text)
        for number in (0, 1):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH, "MASTER_ADDR": "127.0.0.1"}
        self.environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.environment.pop("MASTER_PORT", None)

    def start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "key-file": key.name, "log-file": "munged.log", "pid-file": "munged.pid"}
        files["seed-file"] = "munge.seed"
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        self.wait_for(lambda: (self.folder / "munge.socket").exists(), 10)
        self._daemon("slurmctld", "-D", "-c")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        self.wait_for(lambda: self.run("sinfo", "--noheader", "--format=%T %D", check=False) == "idle 2", 30)

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        if len(self._daemons) == 2 + len(NODES):
            self.run("scancel", "--signal=KILL", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
            self.wait_for(lambda: not self.run("squeue", "--noheader", check=False), 30)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _daemon(self, *command: str) -> None:
        with open(self.folder / "daemons.log", "ab") as log:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def run(self, *command: str, check: bool = True, **variables: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            command, env=self.environment | variables, cwd=self.work, text=True, capture_output=True, timeout=60
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *options: str, arguments: list[str], **variables: str) -> str:
        """The number of a job that runs the script of this repository."""
        return self.run("sbatch", "--parsable", *options, str(SCRIPT), *arguments, **variables)

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows about a job: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job)))

    def wait_for_end(self, job: str, seconds: float) -> dict[str, str]:
        self.wait_for(lambda: self.job(job)["JobState"] in ENDED, seconds, job)
        return self.job(job)

    def logs(self, job: str) -> str:
        return "".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.work.glob(f"slurm-{job}*.log")))

    def wait_for(self, condition, seconds: float, job: str | None = None) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.logs(job) if job else self.daemon_logs()
            time.sleep(0.1)

    def daemon_logs(self) -> str:
        return "".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))
