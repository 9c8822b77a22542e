"""A run that is killed is finished by its own command line; the long list is ``python -m benchmarks.faults``."""

import pytest

from benchmarks.faults import kills, moves

TRIALS = [trial for trial in [*kills.trials(), *moves.trials()] if trial.compact]


@pytest.mark.slow
@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_the_same_command_line_finishes_the_run(trial, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    outcome = trial.run(folder)
    assert outcome.is_acceptable, outcome
