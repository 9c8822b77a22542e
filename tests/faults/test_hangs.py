"""A rank that stops answering is named by the others; the long list is ``python -m benchmarks.faults``."""

import pytest

from benchmarks.faults.hangs import trials


@pytest.mark.slow
@pytest.mark.parametrize("trial", [trial for trial in trials() if trial.compact], ids=lambda trial: trial.name)
def test_the_others_name_it_and_all_end(trial, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    outcome = trial.run(folder)
    assert outcome.is_acceptable, outcome
