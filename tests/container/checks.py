"""What the image must do, and what must not be in it. Everything runs in a container of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.container.buildah import USER, Container
from tests.container.phases import TrialError, execute, expect

QUICK_START = (
    *("deepspeed", "--num_gpus", "2", "launch/pretrain.py", "--deepspeed_config", "ds_configs/galore_zero2.json"),
    *("--model", "ds_configs/models/llama_quickstart.json", "--sequence-length", "128", "--steps", "10"),
    *("--eval-interval", "100", "--save-interval", "200", "--log-interval", "1"),
    *("--output", "runs/quickstart", "--export"),
)
"""What ``make pretrain STEPS=10`` runs, with a record of every step."""
RUNS = "/opt/ds_lowrank/runs"
NOT_FOR_THE_IMAGE = ".env"
STRANGER = "4321:4321"


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


def folder_for(work: Path, name: str, uid: int = 1000) -> Path:
    """An empty folder to mount, which belongs to the container's user."""
    path = work / "mounted" / f"{name}-{time.time_ns()}"
    path.mkdir(parents=True)
    os.chown(path, uid, uid)
    return path


def contents(container: Container, secrets: list[str]) -> str:
    """User, packages and labels are right; keys, this machine's settings and what is ignored are not there."""
    configuration = container.buildah.configuration(container.image)
    expect(configuration["User"] == USER, f"the user is {configuration['User']}")
    expect(container.run("id", "-u").split()[-1] == "1000", "the command does not run as uid 1000")
    expect("No broken requirements" in container.run("python", "-m", "pip", "check"), "pip check")
    for pattern in ("/etc/ssh/ssh_host_*", f"/opt/ds_lowrank/{NOT_FOR_THE_IMAGE}", "/opt/ds_lowrank/tests"):
        expect(container.run("sh", "-c", f"ls -d {pattern} 2>/dev/null || true").split()[-1:] in ([], ["=="]), pattern)
    said = container.buildah("inspect", "--type", "image", container.image)
    root = Path(container.buildah("mount", container.name).strip())
    folders = [root / name for name in ("etc", "home", "root", "run", "opt/ds_lowrank", "opt/venv/constraints.txt")]
    for secret in secrets:
        found = execute(["sh", "-c", 'grep -rIlF -e "$@" || true', "sh", secret, *folders])
        expect(secret not in said and not found.strip(), f"{secret} is in the image: {found or 'its configuration'}")
    labels = configuration["Labels"]
    return f"ds_lowrank {labels['org.opencontainers.image.version']}, {container.buildah.size(container.image)}"


def torch_of_the_base(container: Container) -> str:
    """The base's torch is used, and it is the only one."""
    where = container.run("python", "-c", "import torch; print(torch.__file__)").split()[-1]
    expect(where.startswith("/usr/"), f"torch is {where}")
    for name in ("torch", "triton", "nvidia"):
        container.run("sh", "-c", f"! ls -d /opt/venv/lib/python3*/site-packages/{name}")
    return where


def usage(container: Container) -> str:
    said = container.run()
    expect("launch/pretrain.py" in said and "smoke" in said, said)
    with contextlib.suppress(TrialError):
        container.run("launch/pretrain.py")
        raise AssertionError("a script that is no command was started")
    return "printed without a command"


def quick_start(container: Container, folder: Path) -> str:
    """Ten steps of the quick start: the loss falls, and everything is written by the container's user."""
    container.run(*QUICK_START, mounts={folder: RUNS})
    run = folder / "quickstart"
    found = losses(run)
    expect(list(found) == list(range(1, 11)) and found[10] < found[1], f"losses {found}")
    for name in ("export/config.json", "export/model.safetensors", "loss.png", "summary.json", "checkpoints/latest"):
        expect((run / name).is_file() and (run / name).stat().st_uid == 1000, f"{name} is not there")
    return f"10 steps on 2 ranks, loss {found[1]:.2f} to {found[10]:.2f}, exported"


def smoke(container: Container, user: str = USER, *options: str) -> str:
    said = container.run("smoke", *options, user=user)
    parts = [line.split()[1] for line in said.splitlines() if line.startswith("smoke: ")]
    expect(parts == ["doctor", "training", "resume", "export"], said)
    return "doctor, training, resume, export"


@contextlib.contextmanager
def first_process(container: Container, mounts: dict[Path, str], *words: str) -> Iterator[tuple[int, Path]]:
    """Run a command as process 1 of a namespace, which buildah's chroot has none of; yields its pid here, and a log."""
    root = Path(container.buildah("mount", container.name).strip())
    mount = "".join(f"mount --bind {source} {root}{target}; " for source, target in mounts.items())
    mount += f"mount -t proc proc {root}/proc; mount --bind /dev {root}/dev; "
    mount += f"touch {root}/etc/hosts; mount --bind /etc/hosts {root}/etc/hosts; "  # torchrun looks up localhost
    script = f'{mount} exec chroot --userspec=1000:1000 {root} env -i "$@"'
    environment = [*container.buildah.configuration(container.image)["Env"], "HOME=/home/trainer"]
    inside = [*environment, "sh", "-c", 'cd /opt/ds_lowrank; exec "$@"', "sh", *container.entrypoint, *words]
    log = container.buildah.work / "first.log"
    with log.open("w") as output:
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh", *inside]
        started = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
        while not children.read_text().split():
            time.sleep(0.1)
        yield int(children.read_text().split()[0]), log
    finally:
        started.kill()  # and the kernel its child, with everything in that namespace
        started.wait()


def wait_for(condition: object, seconds: float, what: str) -> float:
    """Wait until a function is true; how many seconds that took."""
    start = time.perf_counter()
    while not condition():  # type: ignore[operator]
        expect(time.perf_counter() - start < seconds, f"{what}: not after {seconds:.0f} s")
        time.sleep(0.1)
    return time.perf_counter() - start


def stop(container: Container, folder: Path) -> str:
    """SIGTERM to the first process, as ``docker stop`` sends it, while torchrun trains: the run is saved."""
    words = ["torchrun", "--standalone", "--nproc_per_node", "2", *QUICK_START[3:], "--resume"]
    words[words.index("10")] = "100000"
    run = folder / "quickstart"
    with first_process(container, {folder: RUNS}, *words) as (pid, log):
        try:
            wait_for(lambda: (run / "metrics.jsonl").is_file() and len(losses(run)) >= 3, 300, "three steps")
            os.kill(pid, signal.SIGTERM)
            seconds = wait_for(lambda: not Path(f"/proc/{pid}/exe").exists(), 60, "the end")
        except TrialError as error:
            raise TrialError(f"{log.read_text()}{error}") from None
    expect((run / "checkpoints/latest").is_file(), f"{log.read_text()}no checkpoint")
    return f"saved at step {max(losses(run))}, ended {seconds:.1f} s after SIGTERM"


def stop_without_handler(container: Container) -> str:
    """A command that handles no signal ends as well, which a first process would not do by itself."""
    with first_process(container, {}, "sleep", "300") as (pid, log):
        wait_for(lambda: Path(f"/proc/{pid}/comm").read_text().strip() == "tini", 10, f"{log.read_text()}tini")
        time.sleep(0.5)
        os.kill(pid, signal.SIGTERM)
        seconds = wait_for(lambda: not Path(f"/proc/{pid}/exe").exists(), 5, "the end")
    return f"ended {seconds:.1f} s after SIGTERM"
