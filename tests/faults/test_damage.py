"""A damaged checkpoint is refused in one line, or the run ends as it would have; the long list is in benchmarks."""

from __future__ import annotations

import pytest

from benchmarks.faults.damage import trials


@pytest.mark.slow
@pytest.mark.parametrize("trial", [trial for trial in trials() if trial.compact], ids=lambda trial: trial.name)
def test_damage(trial, tmp_path):
    (tmp_path / "trial").mkdir()
    outcome = trial.run(tmp_path / "trial")
    assert outcome.is_acceptable, f"{outcome.verdict}: {outcome.detail}"


def test_there_are_enough_of_each_kind():
    found = trials()
    assert len({trial.name for trial in found}) == len(found) >= 160
    assert 20 <= sum(trial.compact for trial in found) <= 30
