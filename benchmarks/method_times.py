"""Time of a whole training step with several optimizers, for benchmarks/methods.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import runs
from benchmarks.common import interleaved
from benchmarks.ranks import engines, on_ranks

TIMED_GAP = 10
"""The refresh interval of the timed engines: short, so that few steps contain many refreshes."""
TIMED_LR = 1e-5
"""The learning rate of the timed engines, whose matrices have that of everything else. At the rates of the table AdamW
would be trained as in no run of it, and its step takes a quarter longer."""


class StepTime(NamedTuple):
    """A training step, amortised over the interval in which one refreshes.

    Attributes:
        seconds: of this optimizer.
        over_adamw: the same over AdamW's, measured in turns in the same process.
    """

    seconds: float
    over_adamw: float


def time_in_turns(
    optimizers: Mapping[str, Mapping[str, Any]], work: Path, sizes: tuple[int, int], gap: int, repeats: int, seed: int
) -> dict[str, StepTime]:
    """Time a training step (forward, backward and step) on one rank, of each optimizer in turns with AdamW.

    Every pair has a process of its own.

    Args:
        optimizers: DeepSpeed's ``optimizer`` entries by name; ``AdamW`` is one of them. Rates are not used.
        work: The folder with the model's configuration and the cache of the text.
        sizes: Sequences per step and tokens per sequence.
        gap: The interval of steps over which the one that refreshes is amortised.
        repeats: Measured steps of each optimizer.
        seed: Seed of the weights and the data.

    Returns:
        The times by name; AdamW's own is timed alone.
    """
    entries = {name: {"type": entry["type"], "params": dict(entry["params"])} for name, entry in optimizers.items()}
    for entry in entries.values():
        entry["params"]["lr"] = TIMED_LR
        if "update_proj_gap" in entry["params"]:
            entry["params"]["update_proj_gap"] = TIMED_GAP
    times = {}
    for name, entry in entries.items():
        pair = {"AdamW": entries["AdamW"], name: entry}
        steps = on_ranks(1, _take_turns, pair, work, sizes, repeats, seed)
        seconds = {each: _amortised(taken, gap) for each, taken in steps.items()}
        times[name] = StepTime(seconds[name], seconds[name] / seconds["AdamW"])
    return times


def _take_turns(
    optimizers: Mapping[str, Mapping[str, Any]], work: Path, sizes: tuple[int, int], repeats: int, seed: int
) -> dict[str, list[tuple[bool, float]]]:
    """Return, for every step of each engine, whether it refreshed and its seconds. All engines see the same batches."""
    from ds_lowrank.models import llama
    from ds_lowrank.training.loop import train_step

    batches = _batches(work, sizes, 1 + repeats, seed)
    built = engines(optimizers, llama.load_config(work / "model.json"), 0, sizes[0], 1, seed)
    taken: dict[str, list[tuple[bool, float]]] = {name: [] for name in built}

    def step(name: str) -> Callable[[], None]:
        def call() -> None:
            engine, own = built[name], taken[name]
            before = _refreshes(engine)
            result = train_step(engine, batches[len(own)], measure=True)
            parts = (result.forward_seconds, result.backward_seconds, result.step_seconds)
            seconds = sum(part for part in parts if part is not None)
            own.append((_refreshes(engine) > before, seconds))

        return call

    interleaved({name: step(name) for name in built}, repeats)
    return {name: own[1:] for name, own in taken.items()}


def _batches(work: Path, sizes: tuple[int, int], steps: int, seed: int) -> list[Any]:
    from ds_lowrank.data.batches import BatchStream
    from ds_lowrank.training.pretraining_data import open_text

    sequences, length = sizes
    text = open_text(
        "stdlib", "bpe", vocab_size=runs.VOCABULARY, model_vocab=runs.VOCABULARY, sequence_length=length,
        held_out=False, cache=work / "cache",
    )  # fmt: skip
    batch = {"global_batch_size": sequences, "micro_batch_size": sequences, "rank": 0, "world_size": 1}
    stream = BatchStream(text.train, **batch, seed=seed)
    return [[{"input_ids": t, "labels": t} for t in stream.next_step()] for _ in range(steps)]


def _refreshes(engine: Any) -> float:
    optimizer = engine.basic_optimizer
    return float(optimizer.metrics()["lowrank/refreshes"]) if hasattr(optimizer, "metrics") else 0.0


def _amortised(steps: Sequence[tuple[bool, float]], gap: int) -> float:
    """Return the mean over an interval in which one step refreshes, from the medians of both kinds of steps."""
    ordinary = median(seconds for refreshed, seconds in steps if not refreshed)
    refreshing = [seconds for refreshed, seconds in steps if refreshed]
    return ordinary + (median(refreshing) - ordinary) / gap if refreshing else ordinary
