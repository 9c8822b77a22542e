"""The tables of the race."""

from __future__ import annotations

from statistics import fmean, median

from benchmarks.common import Numbers
from benchmarks.thin_wire.contenders import RANKS
from benchmarks.thin_wire.race import Measured, named

PEERS = {"AdamW": "AdamW, ZeRO 1", "GaLore": f"GaLore {RANKS[0]}, ZeRO 1", "best PowerSGD": "PowerSGD"}
"""What speeds are compared with: how a column is called, and how the peer's name starts."""


def speed_rows(measured: list[Measured], rate: float) -> Numbers:
    """Return one record for each contender at one rate, with its tokens/s over those of the peers.

    A peer has as many micro-batches as the contender that it is compared with.

    Args:
        measured: All contenders, at that rate too.
        rate: Of the wire in Mbit/s; 0 is no limit.
    """
    found: Numbers = []
    speeds = {of.contender.name: of.tokens / median(of.seconds[rate]) for of in measured}
    for of in measured:
        name, seconds, sent = of.contender.name, of.seconds[rate], median(of.sent[rate])
        peers = [peer.contender.name for peer in measured if peer.contender.micro_batches == of.contender.micro_batches]
        found.append(
            {
                "wire": named(rate),
                "contender": name,
                "tokens/s": speeds[name],
                "s": median(seconds),
                "least s": min(seconds),
                "most s": max(seconds),
                "MB sent": sent / 1e6,
                "wire s": 8e-6 * sent / rate if rate else None,
                "MB with a refresh": of.first_sent / 1e6 if of.contender.refreshes else None,
                "first loss": of.first_loss,
                **{f"x {peer}": _over(name, speeds, peers, start) for peer, start in PEERS.items()},
            }
        )
    return found


def _over(name: str, speeds: dict[str, float], peers: list[str], start: str) -> float | None:
    """Return a contender's speed over that of the fastest peer whose name starts like that; None without one."""
    theirs = [speeds[peer] for peer in peers if peer.startswith(start)]
    return speeds[name] / max(theirs) if theirs else None


def loss_rows(measured: list[Measured]) -> Numbers:
    """Return one record for each contender that has been trained: its loss, and how long it takes to AdamW's.

    Args:
        measured: All contenders, with as many losses each; AdamW at ZeRO 1 among them.
    """
    means = {of.contender.name: _smoothed(of.losses) for of in measured if of.losses}
    dense = means.get(PEERS["AdamW"], [])
    if not dense:
        return []
    goal = dense[len(dense) // 2]
    return [
        {
            "contender": of.contender.name,
            "steps": len(of.losses),
            "loss": means[of.contender.name][-1],
            **{
                f"s to AdamW's at half, {named(rate)}": _seconds(means[of.contender.name], goal, median(seconds))
                for rate, seconds in of.seconds.items()
            },
        }
        for of in measured
    ]


def _smoothed(losses: list[float]) -> list[float]:
    """The mean of a fifth of the steps, up to each step."""
    width = max(1, len(losses) // 5)
    return [fmean(losses[max(0, end - width) : end]) for end in range(1, len(losses) + 1)]


def _seconds(means: list[float], goal: float, seconds: float) -> float | None:
    """How long it takes until the mean is no more than the goal; None where it stays above."""
    return next(((number + 1) * seconds for number, mean in enumerate(means) if mean <= goal), None)
