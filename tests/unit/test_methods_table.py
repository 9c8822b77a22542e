"""The table of methods: AdamW is swept to the end, and differences are those within a seed."""

from __future__ import annotations

import argparse
from math import log2
from pathlib import Path

import pytest

from benchmarks import methods
from benchmarks.contenders import contenders
from benchmarks.method_times import StepTime
from benchmarks.methods import Table, search_all, summary
from benchmarks.runs import Setting
from benchmarks.sweeps import KeptRuns

ADAMW, TANDEM, *_ = (c for c in contenders(128) if c.name in ("AdamW", "Tandem"))
OFFSETS = {"AdamW": [4.0, 4.2, 4.1], "Tandem": [3.9, 4.2, 3.9]}


def fake(least_lr, least_scale):
    """Runs whose loss is a bowl over the logarithms of both rates, and each seed's own at the bottom."""

    def train(setting, optimizer, work, arguments, factor):
        x, y = log2(setting.lr / least_lr), log2(setting.scale / least_scale)
        loss = OFFSETS[setting.optimizer][setting.seed] + x * x + y * y + 1.5 * x * y
        return [{"step": 1, "eval_loss": loss, "lowrank/state_bytes": 100}]

    return train


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(methods.runs, "train", fake(0.01, 1 / 8))
    arguments = argparse.Namespace(seed=0, seeds=3, jobs=2, more=3, quick=False)
    return Table(Path(), arguments, KeptRuns(None, {}, Setting, methods.KEPT))


def test_adamw_is_swept_until_all_its_neighbours_are_worse(table):
    """Beyond the ends of the first sweep, and where both rates have to change together."""
    best = table.best_of_adamw(ADAMW)
    assert (best.lr, best.scale) == (0.01, 1 / 8)
    assert table.losses(best) == {0: 4.0, 1: 4.2, 2: 4.1}


def test_every_other_method_is_swept_at_the_learning_rate_of_adamw(table):
    won = search_all(table, [ADAMW, TANDEM], jobs=2)
    assert won["Tandem"] == Setting("Tandem", 0.01, 1 / 8, 0)


def test_a_difference_is_that_within_a_seed(table):
    times = {"AdamW": StepTime(2.0, 1.0), "Tandem": StepTime(3.3, 1.5)}  # of two processes
    rows = summary(table, search_all(table, [ADAMW, TANDEM], jobs=2), times)
    tandem, adamw = rows
    assert tandem["loss"] == pytest.approx(4.0) and adamw["loss"] == pytest.approx(4.1)
    assert tandem["above AdamW"] == pytest.approx(-0.1)
    assert tandem["its standard error"] == pytest.approx(0.1 / 3**0.5)
    assert (tandem["half"], tandem["twice"]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert (adamw["above AdamW"], tandem["step over AdamW"]) == (0.0, 1.5)
