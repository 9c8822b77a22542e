"""Two nodes as network namespaces: a selection of ``python -m tests.nodes``."""

import pytest

from tests.nodes.cluster import missing
from tests.nodes.trials import trials

LACKING = missing()


@pytest.mark.slow
@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
@pytest.mark.parametrize("trial", [trial for trial in trials() if trial.compact], ids=lambda trial: trial.name)
def test_on_two_nodes(trial, tmp_path):
    trial.run(tmp_path / "cluster")
