"""Time and memory of converting checkpoints, each conversion in a process of its own.

python -m benchmarks.convert

A checkpoint of the weights of a model of ``ds_configs/models``, drawn at random, is converted to every format and two
of them back. Memory is anonymous memory beyond that after imports, at its peak (sampled): what the process cannot give
back, without the pages of files that the system keeps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.common import Numbers, options, report
from ds_lowrank.checkpoint.convert import Wanted, convert
from ds_lowrank.checkpoint.incoming import Incoming, to_ours
from ds_lowrank.models import llama

MODELS = Path(__file__).parents[1] / "ds_configs/models"
STEPS = (
    ("ours", "universal"),
    ("ours", "deepspeed"),
    ("ours", "huggingface"),
    ("universal", "ours"),
    ("deepspeed", "ours"),
)


def make(size: str, folder: Path, seed: int) -> int:
    """Write a checkpoint of random weights; return their number."""
    weights = dict(llama.build(llama.load_config(MODELS / f"llama_{size}.json"), seed=seed).named_parameters())
    found = Incoming(0, lambda: ((n, p.detach()) for n, p in weights.items()), lambda key: iter(()))
    to_ours(found, folder, None, folder / "ours")
    return sum(parameter.numel() for parameter in weights.values())


def anonymous_bytes() -> int:
    """Anonymous memory of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024


def measure(size: str, source: str, target: str, folder: str, answer: Any) -> None:
    """Convert once, and send seconds and bytes."""
    base = Path(folder)
    wanted = Wanted(to=target, config=MODELS / f"llama_{size}.json" if target == "huggingface" else None)
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    convert(base / source, base / (target if source == "ours" else f"{target}_of_{source}"), wanted)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    answer.send({"from": source, "to": target, "seconds": round(seconds, 2), "bytes": peak - before})


def main() -> None:
    """Convert and print the table."""
    parser = options(__doc__)
    parser.add_argument("--model", default="130m", help="of ds_configs/models")
    arguments: argparse.Namespace = parser.parse_args()
    size = "9m" if arguments.quick else arguments.model
    context = multiprocessing.get_context("spawn")
    numbers: Numbers = []
    with tempfile.TemporaryDirectory() as folder:
        parameters = make(size, Path(folder), arguments.seed)
        for source, target in STEPS:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(size, source, target, folder, sender))
            process.start()
            sender.close()
            numbers.append({"model": size, "parameters": parameters, **receiver.recv()})
            process.join()
    report(numbers, arguments)


if __name__ == "__main__":
    main()
