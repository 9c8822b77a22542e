"""The race: contenders take turns on one wire, at one rate after another, and what each sends is counted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import Numbers
from benchmarks.thin_wire.contenders import LENGTH, WARM_UP, Contender
from benchmarks.thin_wire.rank import COLLECTIVES
from benchmarks.thin_wire.ranks import Ranks
from benchmarks.thin_wire.wire import ADDRESSES, Wire


@dataclass
class Measured:
    """What is known of one contender.

    Attributes:
        contender: Which one.
        first_sent: Bytes of the first step, of the busier rank.
        first_loss: Mean loss of the first step over the ranks; the same for all with equally many micro-batches.
        seconds: Of each measured step, by the wire's rate.
        sent: Bytes of each, of the busier rank.
        losses: Mean loss over the ranks in each step of :meth:`Race.train`.
    """

    contender: Contender
    first_sent: int = 0
    first_loss: float = 0.0
    seconds: dict[float, list[float]] = field(default_factory=dict)
    sent: dict[float, list[int]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of a step, over the ranks."""
        return len(ADDRESSES) * self.contender.micro_batches * LENGTH


class Race:
    """All contenders on one wire.

    Args:
        wire: The wire.
        ranks: The ranks at its ends.
    """

    def __init__(self, wire: Wire, ranks: Ranks) -> None:
        self._wire, self._ranks = wire, ranks
        self.measured: list[Measured] = []
        self.refused: Numbers = []

    def build(self, chosen: Sequence[Contender], model: dict[str, Any], seed: int) -> None:
        """Build the contenders and warm them up, without a limit."""
        for contender in chosen:
            answers, _ = self._ranks.tell("build", contender=contender, model=model, seed=seed)
            reason = answers[0]["refused"]
            if reason is not None:
                self.refused.append({"not run": contender.name, "reason": reason})
                continue
            of = Measured(contender)
            for number in range(WARM_UP):
                _, sent, loss = self._step(contender)
                if number == 0:
                    of.first_sent, of.first_loss = sent, loss
            self.measured.append(of)
            progress(f"{contender.name}: built, first loss {of.first_loss:.4f}")

    def run(self, rate: float, repeats: int) -> None:
        """Let the contenders take turns at one rate of the wire, in Mbit/s; 0 is no limit."""
        self._wire.limit(rate or None)
        for _ in range(repeats):
            for of in self.measured:
                seconds, sent, _ = self._step(of.contender)
                of.seconds.setdefault(rate, []).append(seconds)
                of.sent.setdefault(rate, []).append(sent)
                progress(f"{named(rate)}, {of.contender.name}: {seconds:.3f} s, {sent / 1e6:.3f} MB")

    def train(self, steps: int) -> None:
        """Let all train for some steps more without a limit, in turns, and keep their losses."""
        self._wire.limit(None)
        for number in range(steps):
            for of in self.measured:
                of.losses.append(self._step(of.contender)[2])
            if number % 20 == 0:
                progress(f"step {number}: " + ", ".join(f"{of.losses[-1]:.3f}" for of in self.measured))

    def probe(self, rate: float, numbers: int) -> Numbers:
        """Try the collectives at one rate, each with as many fp32 numbers a rank, and with one for each rank."""
        self._wire.limit(rate or None)
        found: Numbers = []
        for name in COLLECTIVES:
            seconds, sent = self._probed(name, numbers)
            found.append(
                {
                    "wire": named(rate),
                    "collective": name,
                    "MB a rank": 4 * numbers / 1e6,
                    "ms": 1e3 * seconds,
                    **{f"MB sent by rank {end}": bytes_ / 1e6 for end, bytes_ in enumerate(sent)},
                    "of the wire": 8e-6 * max(sent) / seconds / rate if rate else None,
                    "one number, ms": 1e3 * self._probed(name, len(sent))[0],
                }
            )
        return found

    def _probed(self, name: str, numbers: int) -> tuple[float, list[int]]:
        before = self._wire.sent()
        answers, _ = self._ranks.tell("probe", name=name, numbers=numbers)
        sent = [after - earlier for after, earlier in zip(self._wire.sent(), before, strict=True)]
        return answers[-1]["seconds"], sent

    def _step(self, contender: Contender) -> tuple[float, int, float]:
        """Take one step; return its seconds, the bytes that the busier rank sent, and the mean loss."""
        before = self._wire.sent()
        answers, seconds = self._ranks.tell("step", name=contender.name)
        sent = max(after - earlier for after, earlier in zip(self._wire.sent(), before, strict=True))
        return seconds, sent, sum(answer["loss"] for answer in answers) / len(answers)


def named(rate: float) -> str:
    """Return a rate of the wire in Mbit/s in words; 0 is no limit."""
    return f"{rate:g} Mbit/s" if rate else "no limit"


def progress(line: str) -> None:
    """Print what happens to standard error."""
    print(line, file=sys.stderr, flush=True)
