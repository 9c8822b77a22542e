"""What only one rank meets is said by that rank; the long list is ``python -m benchmarks.faults``."""

import pytest

from benchmarks.faults.one_rank import trials


@pytest.mark.slow
@pytest.mark.parametrize("trial", [trial for trial in trials() if trial.compact], ids=lambda trial: trial.name)
def test_it_is_said_in_one_line_and_the_other_ranks_end(trial, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    outcome = trial.run(folder)
    assert outcome.is_acceptable, outcome
