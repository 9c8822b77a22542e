from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # the path of a socket must be short
    found = Cluster(folder / "cluster", tmp_path_factory.mktemp("work"))
    try:
        found.start()
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder)
