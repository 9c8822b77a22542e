"""Reporting metrics: to metrics.jsonl, to the console (one line per log step) and to DeepSpeed's monitors."""

from __future__ import annotations

import json
import math
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from deepspeed import DeepSpeedEngine
from tqdm import tqdm

from ds_lowrank.training.atomic_write import write_atomically
from ds_lowrank.training.console import explained
from ds_lowrank.training.records import FILE, read_metrics


class Reporter:
    """Writes the metrics of a run on rank 0. On the other ranks, it does nothing.

    On a terminal there is a progress bar, elsewhere only plain lines.

    Args:
        output: the folder of the run.
        engine: the engine, for its rank, monitors and sample count.
        steps: the run's total number of steps.
        resumed_at: the step after which a resumed run continues. Records of later steps are removed, so that no step
            appears twice.
    """

    def __init__(self, output: Path, engine: DeepSpeedEngine, steps: int, resumed_at: int = 0) -> None:
        self._writes = engine.global_rank == 0
        self._engine = engine
        self._steps = steps
        if not self._writes:
            return
        self._path = output / FILE
        with explained(self._path):
            output.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                _keep_until(self._path, resumed_at)
            self._file = self._path.open("a")
        self._bar = tqdm(total=steps, initial=resumed_at, disable=not sys.stderr.isatty(), unit="step")

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writes:
            with suppress(OSError):  # of what could not be written, which was raised then
                self._bar.close()
                self._file.close()

    def advance(self) -> None:
        """Move the progress bar forward by one step.

        Raises:
            ConsoleError: the terminal is gone.
        """
        if self._writes:
            with explained():
                self._bar.update()

    def record(self, record: dict[str, Any]) -> None:
        """Report one log step. Numbers that are not finite are written as null, as JSON cannot represent them.

        Args:
            record: the record.

        Raises:
            OutputError: it cannot be written.
        """
        if not self._writes:
            return
        with explained(self._path):
            self._file.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")
            self._file.flush()
        self.say(console_line(record, self._steps))
        monitor = self._engine.monitor
        if monitor.enabled:
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
            samples = self._engine.global_samples
            monitor.write_events([(f"Train/Samples/{key}", value, samples) for key, value in numbers.items()])

    def say(self, text: str) -> None:
        """Print a line on the console, above the progress bar.

        Args:
            text: the line.

        Raises:
            ConsoleError: the console is a file on a full disk, or a pipe whose reader is gone.
        """
        if self._writes:
            with explained():
                self._bar.write(text, file=sys.stdout)
                sys.stdout.flush()


def _keep_until(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console_line(record: dict[str, Any], steps: int) -> str:
    """Format the console line of a log step: at most 120 columns, without evaluations.

    Args:
        record: the record, with the keys of ``step_record``. What is not known is left out. The mean rank is shown for
            methods that change it.
        steps: the run's total number of steps.
    """
    norm, tflops, mfu, left = (record[key] for key in ("grad_norm", "tflops_per_gpu", "mfu", "remaining_seconds"))
    parts = [
        f"step {record['step']}/{steps}",
        f"loss {record['loss']:.4f}",
        f"grad {norm:.3f}" if norm is not None else "grad -",
        f"lr {record['lr']:.1e}",
        f"{record['memory_gib']:.3g} GiB",
        f"{record['tokens_per_second_per_gpu']:,.0f} tok/s/GPU",
    ]
    if tflops is not None:
        parts.append(f"{tflops:.3g} TFLOPS" if tflops < 1000 else f"{tflops:.0f} TFLOPS")
    if mfu is not None:
        parts.append(f"MFU {mfu:.0%}")
    if left:
        parts.append(f"{_clock(left)} left")
    if "matrices" in record:
        parts.append(f"mean rank {record['lowrank/mean_rank']:.1f}")
    if record["skipped_steps"]:
        parts.append(f"{record['skipped_steps']} skipped")
    parts += [f"{key.replace('_', ' ')} {value:.4f}" for key, value in record.items() if key.startswith("eval_")]
    return " | ".join(parts)


def _clock(seconds: float) -> str:
    """A time in its two largest units: ``12s``, ``5m03s``, ``1h02m``, ``2d03h``; of ten minutes and more no seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    if minutes:
        return f"{minutes}m" if minutes >= 10 else f"{minutes}m{rest:02}s"
    return f"{rest}s"
