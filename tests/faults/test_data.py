"""Bad data end in one line that names the file; data that are only unusual are read."""

import pytest

from benchmarks.faults.data import trials

COMPACT = {trial.name: trial for trial in trials() if trial.compact}


@pytest.mark.parametrize("name", COMPACT)
def test_bad_data(tmp_path, name):
    outcome = COMPACT[name].run(tmp_path)
    assert outcome.is_acceptable, outcome
