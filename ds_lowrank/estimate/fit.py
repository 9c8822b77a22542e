"""The cheapest configuration that fits on a card: the fewest changes that cost speed, then the fewest changes.

Changes that cost no speed worth mentioning are a higher ZeRO stage up to 2, smaller buckets of gradients, 8-bit moments
and, where the optimizer has them, no fp32 masters and projected reduction. What costs speed is recomputing activations,
a micro-batch of one sequence, ZeRO 3, and offload. The method, its rank, the grid and the global batch stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from ds_lowrank.errors import ConfigError
from ds_lowrank.estimate.setup import Setup, check_reduction
from ds_lowrank.estimate.sizes import size_text
from ds_lowrank.estimate.total import Estimator
from ds_lowrank.integration.unsupported_settings import check_stage, check_supported
from ds_lowrank.training.config import BatchSizes

BUCKET = 50_000_000
"""Elements of a small bucket: 100 MB in 16 bits, still far larger than what a network needs to be busy."""


@dataclass(frozen=True)
class Change:
    """Something that makes a run need less memory.

    Attributes:
        text: what to set.
        apply: returns the changed run, or None where there is nothing to change.
    """

    text: str
    apply: Callable[[Setup], Setup | None]


@dataclass(frozen=True)
class Candidate:
    """A configuration that was tried.

    Attributes:
        changes: what is set.
        costly: how many of these cost speed.
        peak: bytes of the rank that needs most.
        fits: whether that is within the card.
    """

    changes: tuple[str, ...]
    costly: int
    peak: int
    fits: bool


@dataclass(frozen=True)
class Search:
    """What a search has found.

    Attributes:
        size: bytes of the card.
        tried: every candidate, in order.
    """

    size: int
    tried: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate | None:
        """The cheapest candidate that fits; None if none does."""
        return next((one for one in self.tried if one.fits), None)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        tried = [vars(one) | {"changes": list(one.changes)} for one in self.tried]
        best = self.best
        return {"size": self.size, "tried": tried, "best": None if best is None else list(best.changes)}


def _stage(stage: int, is_right: Callable[[Setup], bool] = lambda _: True) -> Callable[[Setup], Setup | None]:
    def apply(setup: Setup) -> Setup | None:
        if setup.grid.data == 1 or setup.zero >= stage or setup.is_projected or not is_right(setup):
            return None
        return setup.with_zero(stage=stage)

    return apply


def _small_buckets(setup: Setup) -> Setup | None:
    small = setup.zero > 0 and setup.zero_settings.get("reduce_bucket_size") in (None, "auto")
    return setup.with_zero(reduce_bucket_size=BUCKET) if small else None


def _param(key: str, value: Any, needs: Callable[[Setup], bool] = lambda _: True) -> Callable[[Setup], Setup | None]:
    def apply(setup: Setup) -> Setup | None:
        known = setup.options is not None and key in type(setup.options).model_fields
        if not known or getattr(setup.options, key) == value or not needs(setup):
            return None
        return setup.with_params(**{key: value})

    return apply


def _checkpointing(setup: Setup) -> Setup | None:
    return None if setup.checkpointing else replace(setup, checkpointing=True)


def _single_sequences(setup: Setup) -> Setup | None:
    batch = setup.batch
    if batch.micro == 1:
        return None
    return replace(setup, batch=BatchSizes(batch.total, 1, batch.accumulation * batch.micro))


def _offload(setup: Setup) -> Setup | None:
    is_open = setup.zero > 0 and not setup.offloads
    return setup.with_zero(offload_optimizer={"device": "cpu"}) if is_open else None


def _without_partitions(setup: Setup) -> bool:
    return setup.zero == 0


def _in_a_pipeline(setup: Setup) -> bool:
    return setup.grid.pipeline > 1


def _without_a_pipeline(setup: Setup) -> bool:
    return setup.grid.pipeline == 1


INT8 = Change("state_dtype int8", _param("state_dtype", "int8"))
NO_MASTERS = Change("master_weights false", _param("master_weights", False))
FREE = (
    (
        Change("zero_optimization.stage 1", _stage(1, _in_a_pipeline)),
        Change("zero_optimization.stage 2", _stage(2, _without_a_pipeline)),
        Change(f"zero_optimization.reduce_bucket_size {BUCKET}", _small_buckets),
        INT8,
        NO_MASTERS,
    ),
    (NO_MASTERS, Change("reduction projected", _param("reduction", "projected", _without_partitions)), INT8),
)
"""Changes that cost no speed: those with partitioned gradients, and those with projected ones."""
COSTLY = (
    Change("--activation-checkpointing", _checkpointing),
    Change("--micro-batch-size 1", _single_sequences),
    Change("zero_optimization.stage 3", _stage(3, _without_a_pipeline)),
    Change("zero_optimization.offload_optimizer cpu", _offload),
)


def search(setup: Setup, size: int, estimator: Estimator) -> Search:
    """Look for the cheapest configuration that fits.

    For each choice of costly changes all free ones are tried together: only if they suffice, fewer are tried.

    Args:
        setup: the run as it is configured.
        size: bytes of the card.
        estimator: of the model.
    """
    peaks: dict[tuple[Change, ...], int] = {}

    def fits(changes: tuple[Change, ...]) -> bool:
        changed = setup if not changes else _changed(setup, changes)
        if changed is None:
            return False
        if changes not in peaks:
            peaks[changes] = estimator.estimate(changed).peak
        return peaks[changes] <= size

    for free, costly in _in_order(setup, fits):
        if fits((*free, *costly)):
            break
    tried = [
        Candidate(tuple(one.text for one in changes), sum(one in COSTLY for one in changes), peak, peak <= size)
        for changes, peak in peaks.items()
    ]
    return Search(size, tuple(sorted(tried, key=lambda one: (one.costly, len(one.changes)))))


def _in_order(
    setup: Setup, fits: Callable[[tuple[Change, ...]], bool]
) -> Iterator[tuple[tuple[Change, ...], tuple[Change, ...]]]:
    """Free and costly changes, the cheapest first, of those that can still lead to something that fits."""
    yield (), ()
    for costly in (chosen for count in range(len(COSTLY) + 1) for chosen in combinations(COSTLY, count)):
        enough = [all_ for path in FREE if fits((*(all_ := _applicable(setup, path)), *costly))]
        chosen = {fewer: None for all_ in enough for n in range(len(all_) + 1) for fewer in combinations(all_, n)}
        yield from ((fewer, costly) for fewer in sorted(chosen, key=len))


def _applicable(setup: Setup, path: Sequence[Change]) -> tuple[Change, ...]:
    """The changes of a path that change something, each after those before it."""
    found: list[Change] = []
    for change in path:
        changed = change.apply(setup)
        if changed is not None:
            found.append(change)
            setup = changed
    return tuple(found)


def _changed(setup: Setup, changes: Sequence[Change]) -> Setup | None:
    """The run after some changes; None if one of them changes nothing, or if a program would refuse it."""
    changed: Setup | None = setup
    for change in changes:
        changed = None if changed is None else change.apply(changed)
    if changed is None:
        return None
    try:
        check_supported(changed.config, changed.method)
        check_stage(changed.config, changed.grid.tensor, changed.grid.pipeline > 1)
        _ = changed.options  # validated
        check_reduction(changed.config)
    except ConfigError:
        return None
    return changed


def search_text(search: Search) -> str:
    """One line a candidate, and what came of it.

    Args:
        search: what was found.
    """
    lines = [f"Candidates for {size_text(search.size)}, by the number of changes that cost speed:"]
    for one in search.tried:
        changes = ", ".join(one.changes) or "as configured"
        verdict = "fits" if one.fits else "does not fit"
        lines.append(f"  {one.costly}  {size_text(one.peak):>9}  {verdict:<12}  {changes}")
    best = search.best
    if best is None:
        lines.append(f"Nothing fits {size_text(search.size)}: lower the rank, or use more ranks or a smaller model.")
    else:
        lines.append(f"The cheapest that fits: {', '.join(best.changes) or 'as configured'}.")
    return "\n".join([*lines, "CUDA's context and what torch's allocator cannot use come on top."])
