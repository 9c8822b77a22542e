"""Trials of bad data: each reader with data that are damaged, of another kind, or only unusual.

Right is one line that names the file, or where a file is only unusual the same documents or rows as without it. Most
call the readers in this process; the last ones start the programs.
"""

from __future__ import annotations

from benchmarks.faults.data_files import file_trials
from benchmarks.faults.data_sets import config_trials, folder_trials, label_trials, token_trials
from benchmarks.faults.data_starts import starts
from benchmarks.faults.trial import Trial


def trials() -> list[Trial]:
    """All trials, by reader."""
    return [*file_trials(), *folder_trials(), *label_trials(), *token_trials(), *config_trials(), *starts()]
