"""A selection of ``benchmarks/damaged_checkpoints.py``: refused on every rank in one line, with nothing changed."""

from __future__ import annotations

from benchmarks.damaged_checkpoints import damages, tried


def test_damaged_checkpoints_are_refused(tmp_path):
    chosen = [damage for damage in damages() if damage.compact]
    records = tried(chosen, tmp_path)
    assert not [record for record in records if record["problem"]]
    assert 10 <= len(chosen) <= 15


def test_there_are_enough_of_them():
    found = damages()
    assert len({damage.name for damage in found}) == len(found) >= 60
