"""Kills and signals at random moments; the same command line then finishes the run with the same result."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from benchmarks.faults.one_rank import raises, workspace
from benchmarks.faults.programs import LAUNCH, Running, run
from benchmarks.faults.trial import Outcome, Trial

STEPS, INTERVAL = 10, 3
MOMENTS = ("before the first save", "during a save", "between two saves", "after the last save")
VICTIMS = ("rank 0", "rank 1", "all ranks", "SIGTERM to rank 0", "SIGTERM to all")
LAYOUTS: dict[str, dict[str, Any]] = {
    "ZeRO 2": {},
    "ZeRO 3": {"zero_optimization": {"stage": 3}},
    "bf16 at ZeRO 1": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "AdamW at ZeRO 0": {
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    },
}
FULL = OSError(errno.ENOSPC, "No space left on device")
WRITES: dict[str, tuple[str, Exception, int]] = {
    "the metrics": ("ds_lowrank.training.metrics:_finite", FULL, 60),
    "the plot": ("ds_lowrank.training.output:plot_loss", FULL, 1),
    "the summary": ("ds_lowrank.training.output:write_atomically", FULL, 2),
    "the export": (
        "transformers:PreTrainedModel.save_pretrained",
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        1,
    ),
}
"""What is written outside checkpoints: what raises, and at its how-manieth call."""
ATTEMPTS = 3
"""How often a command line is given at most: a kill hits once, so the second time has to do."""


def _command(folder: Path, layout: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    # --resume from the first time on, as in a script that a cluster starts again and again.
    more = (
        "--save-interval",
        str(INTERVAL),
        "--eval-interval",
        "4",
        "--export",
        "--timeout",
        "20",
        "--setup-timeout",
        "20",
        "--resume",
    )
    return workspace(folder, STEPS, *more, config=LAYOUTS[layout])


def _result(folder: Path) -> tuple[dict[int, dict[str, Any]], dict[str, torch.Tensor]]:
    """The records by step without what is measured in seconds and bytes, and the exported weights."""
    output = folder / "run"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "tokens", "loss", "eval_loss", "grad_norm", "lr")
    records = {line["step"]: {key: line.get(key) for key in keys} for line in lines}
    if len(records) != len(lines) or not (output / "summary.json").is_file():
        raise ValueError("a step twice, or no summary")
    return records, load_file(output / "export" / "model.safetensors")


def wait_for_moment(running: Running, moment: str, folder: Path, chance: random.Random) -> None:
    """Wait until a run is at a moment, and a little longer.

    Args:
        running: the run.
        moment: one of ``MOMENTS``.
        folder: in which it runs.
        chance: of the exact moment.
    """
    checkpoints, metrics = folder / "run" / "checkpoints", folder / "run" / "metrics.jsonl"

    def steps() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    if moment == "before the first save":
        wanted = chance.randrange(INTERVAL)
        running.wait_for(lambda: steps() >= wanted)
    elif moment == "during a save":
        tag = f".global_step{chance.choice(range(INTERVAL, STEPS, INTERVAL))}.partial"
        running.wait_for(lambda: (checkpoints / tag).exists())
    elif moment == "between two saves":
        wanted = chance.randrange(INTERVAL + 1, STEPS - 1)
        running.wait_for(lambda: steps() >= wanted)
    else:
        running.wait_for(lambda: (checkpoints / f"global_step{STEPS}").exists())
    time.sleep(chance.random() * 0.02)


def killed(folder: Path, layout: str, moment: str, victim: str, seed: int) -> Outcome:
    """Kill a run once and give the same command line until it is finished.

    Args:
        folder: an empty folder.
        layout: a key of ``LAYOUTS``.
        moment: one of ``MOMENTS``.
        victim: one of ``VICTIMS``.
        seed: of the exact moment.
    """
    arguments = _command(folder / "killed", layout)
    running = Running("pretrain", arguments, 2, folder / "killed")
    wait_for_moment(running, moment, folder / "killed", random.Random(seed))
    number = signal.SIGTERM if "SIGTERM" in victim else signal.SIGKILL
    for rank in (0, 1) if "all" in victim else (int(victim[-1]),):
        running.send(number, rank)
    finished = running.finish(60)
    if finished.hung:
        return Outcome("hang", finished.err[-300:])
    if "Traceback" in finished.err or "gloo" in finished.err:
        return Outcome("traceback", finished.err[-300:])
    return _again(folder, arguments, layout)


@cache
def _undisturbed(layout: str) -> tuple[dict[int, dict[str, Any]], dict[str, torch.Tensor]]:
    """The result of a run that nothing disturbs."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "whole"
        finished = run("pretrain", _command(folder, layout), 2, folder)
        if not finished.succeeded:
            raise ValueError(f"without a fault: {finished.err[-300:]}")
        return _result(folder)


def _again(folder: Path, arguments: Sequence[str], layout: str) -> Outcome:
    """Give the command line until the run in ``killed`` is finished; compare it with an undisturbed one."""
    for _ in range(ATTEMPTS):
        finished = run("pretrain", arguments, 2, folder / "killed")
        if finished.succeeded:
            return _compare(folder, layout)
        if finished.hung:
            break
    return Outcome("hang" if finished.hung else "cannot go on", finished.err[-400:])


def _compare(folder: Path, layout: str) -> Outcome:
    try:
        (records, weights), (again, reached) = _undisturbed(layout), _result(folder / "killed")
    except (OSError, ValueError) as error:
        return Outcome("other result", str(error))
    if records != again:
        different = [step for step in records if records[step] != again.get(step)]
        return Outcome("other result", f"records of steps {different}")
    names = [name for name in weights if name not in reached or not torch.equal(weights[name], reached[name])]
    return Outcome("other result", f"weights {names[:3]}") if names else Outcome("same result")


def full_disk(folder: Path, target: str, error: Exception, calls: int) -> Outcome:
    """A disk is full for rank 0, outside a checkpoint; with room again, the same command line finishes the run.

    Args:
        folder: an empty folder.
        target: the function that writes, as ``module:name``.
        error: what it raises.
        calls: from which call on.
    """
    arguments = _command(folder / "killed", "ZeRO 2")
    running = Running("pretrain", arguments, 2, folder / "killed", partial(raises, target, error, calls, 0))
    finished = running.finish(60)
    outcome = finished.refusal()
    if outcome.verdict != "refused":
        return outcome
    lines = finished.err.splitlines()
    if not any(line.startswith("rank 0: error: ") and "--resume" in line for line in lines):
        return Outcome("no message", outcome.detail)
    return _again(folder, arguments, "ZeRO 2")


def _without_a_reader(rank: int) -> None:
    """Give rank 0 a pipe as its standard output whose reader is gone, as ``| head`` leaves it."""
    if rank == 0:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # the former one may have been of a file


def lost_console(folder: Path) -> Outcome:
    """Rank 0 cannot print any more: the run is saved before it ends, and the same command line finishes it.

    Args:
        folder: an empty folder.
    """
    arguments = _command(folder / "killed", "ZeRO 2")
    running = Running("pretrain", arguments, 2, folder / "killed", _without_a_reader)
    finished = running.finish(60)
    outcome = finished.refusal()
    if outcome.verdict != "refused":
        return outcome
    saved = [path.name for path in (folder / "killed" / "run" / "checkpoints").glob("global_step*")]
    if saved != ["global_step1"] or "rank 0: error: the console output cannot be written" not in finished.err:
        return Outcome("files lost", f"{saved}: {finished.err[-300:]}")
    return _again(folder, arguments, "ZeRO 2")


def launcher_signalled(folder: Path, launcher: Sequence[str], number: int) -> Outcome:
    """Signal the launcher alone: the ranks save, and end.

    Args:
        folder: an empty folder.
        launcher: the module and its arguments.
        number: the signal.
    """
    arguments = _command(folder / "killed", "ZeRO 2")
    position = arguments.index("--steps") + 1
    endless = [*arguments[:position], "100000", *arguments[position + 1 :], "--save-interval", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(LAUNCH.parent), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (folder / "out").open("w") as out:
        process = psutil.Popen(
            [sys.executable, "-m", *launcher, str(LAUNCH / "pretrain.py"), *endless],
            env=environment,
            cwd=folder / "killed",
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    metrics = folder / "killed" / "run" / "metrics.jsonl"
    if not _until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2, 120):
        process.kill()
        return Outcome("cannot go on", (folder / "out").read_text()[-300:])
    ranks = process.children(recursive=True)
    process.send_signal(number)
    _, alive = psutil.wait_procs([process, *ranks], timeout=60)
    for left in alive:
        left.kill()
    said = (folder / "out").read_text()
    if alive:
        return Outcome("hang", f"{len(alive)} processes did not end: {said[-200:]}")
    saved = list((folder / "killed" / "run" / "checkpoints").glob("global_step*"))
    if len(saved) != 1 or "--resume continues from here" not in said:
        return Outcome("cannot go on", f"{len(saved)} checkpoints: {said[-300:]}")
    return Outcome("same result", saved[0].name)


def _until(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def stopped_rank(folder: Path, number: int) -> Outcome:
    """Stop rank 1; two signals end rank 0, which waits for it in a collective.

    Args:
        folder: an empty folder.
        number: the signal that is sent twice.
    """
    running = Running("pretrain", workspace(folder, 100_000), 2, folder)
    metrics = folder / "run" / "metrics.jsonl"
    running.wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2)
    running.send(signal.SIGSTOP, 1)
    time.sleep(0.5)
    running.send(number, 0)
    time.sleep(1.5)
    if not running.processes[0].is_alive():
        return Outcome("other result", "the first signal ended it")
    running.send(number, 0)
    running.processes[0].join(10)
    ended = not running.processes[0].is_alive()
    running.send(signal.SIGKILL, 1)
    finished = running.finish(10)
    if not ended:
        return Outcome("hang", finished.err[-300:])
    lines = finished.err.strip().splitlines()
    return Outcome("refused" if finished.codes[0] == 128 + number and len(lines) == 2 else "no message", lines[-1])


def silent_rank(folder: Path, rank: int) -> Outcome:
    """Stop a rank; the other one ends when --timeout is over and names it.

    Args:
        folder: an empty folder.
        rank: the rank that is stopped.
    """
    running = Running("pretrain", workspace(folder, 100_000, "--timeout", "3"), 2, folder)
    metrics = folder / "run" / "metrics.jsonl"
    running.wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2)
    running.send(signal.SIGSTOP, rank)
    running.processes[1 - rank].join(20)
    running.send(signal.SIGKILL, rank)
    outcome = running.finish(10).refusal()
    expected = f"rank {1 - rank}: error: no answer from rank {rank} within --timeout 3 s: stopped, or hanging"
    return Outcome(outcome.verdict if outcome.detail.startswith(expected) else "no message", outcome.detail)


def _free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _deepspeed(folder: Path, number: int) -> Outcome:
    launcher = ("deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", _free_port())
    return launcher_signalled(folder, launcher, number)


def _torchrun(folder: Path, number: int) -> Outcome:
    return launcher_signalled(folder, ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"), number)


def trials() -> list[Trial]:
    """Sixty random kills, and signals to launchers and to ranks that wait."""
    found = []
    for seed in range(60):
        chance = random.Random(seed)
        moment, victim = MOMENTS[seed % len(MOMENTS)], VICTIMS[seed % len(VICTIMS)]
        layout = chance.choice(list(LAYOUTS))
        name = f"{seed}: {victim} {moment}, {layout}"
        run_one = partial(killed, layout=layout, moment=moment, victim=victim, seed=seed)
        found.append(Trial(name, run_one, compact=seed in (0, 1, 6, 7)))
    for number in (signal.SIGTERM, signal.SIGKILL):
        found.append(Trial(f"{number.name} to deepspeed", partial(_deepspeed, number=number)))
    found.append(Trial("SIGTERM to torchrun", partial(_torchrun, number=signal.SIGTERM)))
    found += [
        Trial(f"a full disk at {what}", partial(full_disk, target=t, error=e, calls=n), what == "the export")
        for what, (t, e, n) in WRITES.items()
    ]
    found.append(Trial("a console whose reader is gone", lost_console, True))
    found += [
        Trial(f"a second {number.name} while rank 1 is stopped", partial(stopped_rank, number=number), index == 0)
        for index, number in enumerate((signal.SIGTERM, signal.SIGINT))
    ]
    found += [Trial(f"rank {rank} is silent", partial(silent_rank, rank=rank), rank == 1) for rank in (0, 1)]
    return found
