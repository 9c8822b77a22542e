"""Does this machine train? ``smoke`` as the command of the image; outside, ``python launch/container/smoke.py``.

What is installed, ten steps of GaLore at ZeRO 2 on every GPU (without one, on two CPU ranks), two more steps after a
resume, and the export: a minute, no download. Every part ends with one line and its time; the first that fails ends the
program with exit code 1, after what it said.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS, MORE = 10, 2
LIMIT_S = 600


class SmokeError(Exception):
    """A part failed; the message says how."""


def run(command: list[str]) -> str:
    """Run a command in the folder of the project.

    Returns:
        What it printed.

    Raises:
        SmokeError: it failed, or took more than ``LIMIT_S`` seconds.
    """
    try:
        done = subprocess.run(
            command, cwd=ROOT, text=True, timeout=LIMIT_S, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout
        raise SmokeError(f"{said or ''}no end after {LIMIT_S} s") from None
    if done.returncode:
        raise SmokeError(f"{done.stdout}exit code {done.returncode}")
    return done.stdout


def training(output: Path, ranks: int, steps: int) -> list[str]:
    """Return the command that trains to a step, from the newest checkpoint if there is one.

    The text is this project's code, in bytes, so that neither a tokenizer nor much text has to be made first.
    """
    return [
        *("deepspeed", "--num_gpus", str(ranks), "launch/pretrain.py"),
        *("--deepspeed_config", "ds_configs/galore_zero2.json", "--model", "ds_configs/models/llama_quickstart.json"),
        *("--data", "ds_lowrank", "--tokenizer", "bytes", "--sequence-length", "128", "--micro-batch-size", "4"),
        *("--steps", str(steps), "--warmup", "2", "--log-interval", "1", "--eval-sequences", "8"),
        *("--output", str(output), "--cache", str(output / "cache"), "--resume", "--export"),
    ]


def losses(output: Path) -> dict[int, float]:
    """Read the training loss of every step."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


def check_losses(found: dict[int, float], steps: int) -> str:
    """Check that every step is there and that the loss has fallen.

    Returns:
        The first and the last loss, as text.

    Raises:
        SmokeError: a step is missing or there twice, a loss is not finite, or the last is not below the first.
    """
    if list(found) != list(range(1, steps + 1)):
        raise SmokeError(f"steps {list(found)} are recorded, not 1 to {steps}")
    if not all(map(math.isfinite, found.values())) or found[steps] >= found[1]:
        raise SmokeError(f"the loss does not fall: {found}")
    return f"loss {found[1]:.2f} to {found[steps]:.2f}"


def train(output: Path, ranks: int) -> str:
    """Train from new weights."""
    run(training(output, ranks, STEPS))
    return f"{STEPS} steps on {ranks} ranks, {check_losses(losses(output), STEPS)}"


def resume(output: Path, ranks: int) -> str:
    """Go on from the checkpoint."""
    before = losses(output)
    run(training(output, ranks, STEPS + MORE))
    after = losses(output)
    if any(after.get(step) != loss for step, loss in before.items()):
        raise SmokeError(f"the steps before the resume were trained again: {before}, then {after}")
    return f"{MORE} steps more, {check_losses(after, STEPS + MORE)}"


def load_export(output: Path, ranks: int) -> str:
    """Load the exported model as Hugging Face does, and compute a loss with it."""
    code = (
        "import sys, torch, transformers; "
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "tokens = transformers.AutoTokenizer.from_pretrained(sys.argv[1])('def f(x):', return_tensors='pt').input_ids; "
        "loss = float(model(input_ids=tokens, labels=tokens).loss.detach()); "
        "assert loss == loss and loss < 100, loss; "
        "print(sum(weight.numel() for weight in model.parameters()))"
    )
    parameters = int(run([sys.executable, "-c", code, str(output / "export")]).split()[-1])
    return f"transformers loads it, {parameters / 1e6:.1f} million parameters"


def doctor(output: Path, ranks: int) -> str:
    """Show what is installed."""
    print(run([sys.executable, "-m", "ds_lowrank", "doctor"]), end="")
    return "everything required is installed"


PARTS: dict[str, Callable[[Path, int], str]] = {
    "doctor": doctor,
    "training": train,
    "resume": resume,
    "export": load_export,
}


def smoke(output: Path, ranks: int) -> int:
    """Run all parts; the exit code."""
    for name, part in PARTS.items():
        start = time.perf_counter()
        try:
            result = part(output, ranks)
        except SmokeError as error:
            print(f"{error}\nsmoke: {name} failed", flush=True)
            return 1
        print(f"smoke: {name:<8} {time.perf_counter() - start:5.1f} s  {result}", flush=True)
    return 0


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="smoke", description="Try this machine: train, resume, export.")
    parser.add_argument("--ranks", type=int, help="processes on this machine; the default is one per GPU, or 2")
    arguments = parser.parse_args()
    ranks = arguments.ranks
    if ranks is None:
        import torch

        ranks = torch.accelerator.device_count() or 2
    with tempfile.TemporaryDirectory(prefix="smoke-") as folder:
        return smoke(Path(folder) / "run", ranks)


if __name__ == "__main__":
    sys.exit(main())
