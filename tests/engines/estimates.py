"""The setup of an estimate for the models that the tests of engines train."""

from __future__ import annotations

from typing import Any

from ds_lowrank.estimate.optimizer import Counter, Model
from ds_lowrank.estimate.setup import Setup
from ds_lowrank.training.config import BatchSizes
from ds_lowrank.training.parallelism import GridShape


def setup_of(model: Any, settings: dict[str, Any], ranks: int, tensor: int = 1, pipeline: int = 1) -> Setup:
    """The setup of a configuration on a grid, with one micro-batch of one sequence of 64 tokens a step."""
    return Setup(model, settings, GridShape(ranks, tensor, pipeline), BatchSizes(ranks, 1, 1), 64, False)


def states_of(setup: Setup) -> list[list[tuple[int, int]]]:
    """For every stage and rank the estimated bytes of the states of matrices, and of the rest."""
    model = Model(setup)
    return [[(one.matrices, one.rest) for one in Counter(setup, model, stage).states()] for stage in model.stages]
