"""The estimate of a run: every kind of rank, every part, and what is sent."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ds_lowrank.estimate.activations import Activations, Pass, activations
from ds_lowrank.estimate.deepspeed import Kept, bytes_sent, kept
from ds_lowrank.estimate.optimizer import Model, OptimizerPart, Stage, optimizer_part
from ds_lowrank.estimate.projected import without_whole_gradients
from ds_lowrank.estimate.setup import Setup


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in an optimizer step.

    Attributes:
        gradients_and_weights: by DeepSpeed, over the data-parallel ranks.
        optimizer: in an ordinary step.
        refresh: by the optimizer in a step with a refresh.
        tensor: activations and their gradients, over the tensor-parallel ranks.
        pipeline: activations and their gradients, to other stages.
    """

    gradients_and_weights: int
    optimizer: int
    refresh: int
    tensor: int
    pipeline: int

    @property
    def total(self) -> int:
        """Of an ordinary step."""
        return self.gradients_and_weights + self.optimizer + self.tensor + self.pipeline


@dataclass(frozen=True)
class RankEstimate:
    """One kind of rank: a pipeline stage. All are bytes.

    Attributes:
        stage: of the pipeline, from 0.
        kept: what DeepSpeed keeps.
        optimizer: what the optimizer keeps and needs.
        activations: of the configured kind.
        not_checkpointed: activations without checkpointing.
        checkpointed: activations with checkpointing.
        traffic: what is sent in a step.
        accumulates: whether gradients of earlier micro-batches are there during a pass.
        offloaded: bytes that are in the host's memory instead.
    """

    stage: int
    kept: Kept
    optimizer: OptimizerPart
    activations: Activations
    not_checkpointed: Activations
    checkpointed: Activations
    traffic: Traffic
    accumulates: bool
    offloaded: int = 0

    @property
    def always(self) -> int:
        """What stays between steps."""
        own = self.kept.weights + self.kept.masters + self.optimizer.states.total
        return own + self.optimizer.gathered + self.kept.always - self.offloaded

    @property
    def backward(self) -> int:
        """The peak of a forward and backward pass: gradients come as activations go."""
        earlier = self.kept.gradients if self.accumulates else 0
        at_the_loss = earlier + self.activations.peak
        at_the_end = self.kept.gradients + self.activations.at_the_end
        return self.always + self.optimizer.copy + self.kept.backward + max(at_the_loss, at_the_end)

    @property
    def step(self) -> int:
        """The peak of a reduction and an optimizer step, with a refresh."""
        temporary = max(self.optimizer.ordinary, self.optimizer.refresh)
        before = max(self.kept.gradients + self.kept.reducing, self.kept.converting)
        in_the_step = 0 if self.offloaded else self.kept.in_the_step + temporary
        return self.always + max(before, in_the_step)

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return max(self.backward, self.step)


@dataclass(frozen=True)
class Estimate:
    """A run.

    Attributes:
        setup: what was estimated.
        ranks: every kind of rank; stages that are alike are one kind.
    """

    setup: Setup
    ranks: tuple[RankEstimate, ...]

    @property
    def peak(self) -> int:
        """Bytes of the rank that needs most."""
        return max(rank.peak for rank in self.ranks)

    @property
    def shared_state(self) -> int:
        """Bytes of moments and bases of all stages: ``lowrank/state_bytes`` in the log."""
        return sum(rank.optimizer.shared for rank in self.ranks)

    def as_json(self) -> dict[str, Any]:
        """Plain values, all in bytes."""
        return {
            "optimizer": self.setup.method,
            "zero": self.setup.zero,
            "peak": self.peak,
            "lowrank/state_bytes": self.shared_state,
            "ranks": [_rank_as_json(rank) for rank in self.ranks],
        }


def _rank_as_json(rank: RankEstimate) -> dict[str, Any]:
    parts = {key: getattr(rank, key) for key in ("always", "backward", "step", "peak")}
    both = {"activations": rank.not_checkpointed.peak, "activations_checkpointed": rank.checkpointed.peak}
    return {**asdict(rank), **parts, **both, "sent": asdict(rank.traffic) | {"total": rank.traffic.total}}


class Estimator:
    """Estimates runs of one model, and remembers what several of them have in common."""

    def __init__(self) -> None:
        self._models: dict[Hashable, Model] = {}
        self._parts: dict[Hashable, OptimizerPart] = {}

    def estimate(self, setup: Setup) -> Estimate:
        """Estimate a run.

        Args:
            setup: the run; of the same model as all others.

        Raises:
            ConfigError: the optimizer would refuse the model or its options.
        """
        shape = (setup.grid, setup.dtype)
        if shape not in self._models:
            self._models[shape] = Model(setup)
        model = self._models[shape]
        return Estimate(setup, tuple(self._rank(setup, model, stage) for stage in model.stages))

    def _rank(self, setup: Setup, model: Model, stage: Stage) -> RankEstimate:
        params = json.dumps(setup.params, sort_keys=True, default=str)
        deals = setup.zero_settings.get("round_robin_gradients")
        key = (setup.grid, setup.dtype, setup.method, params, setup.zero, setup.accumulator, deals, stage.number)
        if key not in self._parts:
            self._parts[key] = optimizer_part(setup, model, stage)
        part, dense = self._parts[key], kept(setup, stage.numels)
        if part.projections is not None:
            dense = without_whole_gradients(dense, part.projections, setup.weight)
        found = {checkpoints: _activations(setup, stage, checkpoints) for checkpoints in (False, True)}
        return RankEstimate(
            stage=stage.number,
            kept=dense,
            optimizer=part,
            activations=found[setup.checkpointing],
            not_checkpointed=found[False],
            checkpointed=found[True],
            traffic=_traffic(setup, stage, part),
            accumulates=setup.batch.accumulation > 1 or setup.zero == 3 or setup.uses_bf16_optimizer,
            offloaded=dense.masters + part.states.total if setup.offloads else 0,
        )


def _activations(setup: Setup, stage: Stage, checkpointing: bool) -> Activations:
    one = Pass(setup.batch.micro, setup.sequence, setup.weight, setup.grid.tensor, checkpointing)
    in_flight = min(setup.grid.pipeline - stage.number, setup.batch.accumulation)  # 1F1B
    return activations(setup.model, one, stage.layers, stage.number == setup.grid.pipeline - 1, in_flight)


def _traffic(setup: Setup, stage: Stage, part: OptimizerPart) -> Traffic:
    """What a rank sends.

    Of the activations of a micro-batch, t x H: a decoder layer sums two over the tensor-parallel ranks in the forward
    pass, two in the backward pass, and two more if it is recomputed; the embedding one, the head one. A pipeline stage
    sends one to the next and its gradient to the one before.
    """
    tensor, stages = setup.grid.tensor, setup.grid.pipeline
    one = setup.weight * setup.batch.micro * setup.sequence * setup.model.hidden_size * setup.batch.accumulation
    sums = stage.layers * (6 if setup.checkpointing else 4) + (stage.number == 0) + (stage.number == stages - 1)
    return Traffic(
        gradients_and_weights=bytes_sent(setup, stage.numels if part.projections is None else [part.projections.rest]),
        optimizer=part.sent_ordinary,
        refresh=part.sent_refresh,
        tensor=round(2 * (tensor - 1) / tensor * one * sums),
        pipeline=one * ((stage.number > 0) + (stage.number < stages - 1)),
    )


def kinds(ranks: Sequence[RankEstimate]) -> list[tuple[str, RankEstimate]]:
    """Name every kind of rank; the stages between the first and the last are one kind, that which needs most.

    Args:
        ranks: one for each stage.
    """
    if len(ranks) == 1:
        return [("every rank", ranks[0])]
    middle = sorted(ranks[1:-1], key=lambda rank: rank.peak)[-1:]
    return [("first stage", ranks[0]), *(("middle stages", rank) for rank in middle), ("last stage", ranks[-1])]
