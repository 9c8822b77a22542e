"""Sweeps of the benchmarks: which values are tried, which runs are not repeated, what the table of fine-tuning says."""

import argparse
import json
from dataclasses import dataclass

import pytest

from benchmarks import finetuning
from benchmarks.finetuning import Table, rates, search_all, summary
from benchmarks.finetuning_contenders import CONTENDERS
from benchmarks.sweeps import KeptRuns, best_on_line

TASKS = ["stdlib-functions", "stdlib-order"]


@dataclass(frozen=True)
class Setting:
    lr: float


@pytest.mark.parametrize(
    ("least", "more", "best", "tried"),
    [
        (1.0, 3, 1.0, [1, 0.5, 2]),
        (0.5, 0, 0.5, [1, 0.5, 2]),
        (0.5, 1, 0.5, [1, 0.5, 2, 0.25]),
        (0.1, 1, 0.25, [1, 0.5, 2, 0.25]),
        (9.0, 2, 8.0, [1, 0.5, 2, 4, 8]),
    ],
)
def test_a_sweep_goes_on_beyond_an_end_that_is_best(least, more, best, tried):
    asked = []
    assert best_on_line(1.0, lambda value: asked.append(value) or abs(value - least), more) == best
    assert asked == tried


def test_a_run_in_the_file_is_not_repeated(tmp_path):
    file, shared = tmp_path / "numbers.json", {"steps": 3}
    kept = KeptRuns(file, shared, Setting, ("loss",))
    for lr in (1.0, 2.0):
        assert kept.get(Setting(lr), lambda lr=lr: [{"loss": lr, "other": 0}])[-1]["loss"] == lr
        assert len(json.loads(file.read_text())["runs"]) == lr  # written after every run
    again = KeptRuns(file, shared, Setting, ("loss",))
    assert again.get(Setting(2.0), pytest.fail) == [{"loss": 2.0}]
    assert again.as_record() == kept.as_record() == json.loads(file.read_text())
    with pytest.raises(SystemExit, match=r"has runs of \{'steps': 3\}, this command makes runs of \{'steps': 4\}"):
        KeptRuns(file, {"steps": 4}, Setting, ("loss",))
    assert KeptRuns(None, shared, Setting, ("loss",)).get(Setting(1.0), lambda: [{}]) == [{}]


@pytest.fixture
def runs(monkeypatch):
    """Runs that are as accurate as the logarithm of their rate is close to that of 4e-3, less on a second seed."""
    made = []

    def finetune(setting, contender, *_):
        made.append(setting)
        accuracy = {5e-4: 0.3, 1e-3: 0.5, 2e-3: 0.6, 4e-3: 0.8, 8e-3: 0.2}[setting.lr] - 0.1 * setting.seed
        state = {} if contender.type == "AdamW" else {"lowrank/state_bytes": 1000}
        return [{"eval_accuracy": accuracy, "trainable_parameters": 2_000_000, "seconds": 5.0, **state}]

    monkeypatch.setattr(finetuning, "finetune", finetune)
    monkeypatch.setattr(finetuning, "largest_class", lambda task: 0.5)
    return made


@pytest.mark.parametrize(
    ("name", "rate", "tried"),
    [("GaLore", 4e-3, [4e-3, 2e-3, 8e-3]), ("AdamW", 4e-3, [1e-3, 5e-4, 2e-3, 4e-3])],
)
def test_fine_tuning_is_swept_on_each_task_and_then_repeated(runs, tmp_path, name, rate, tried):
    arguments = argparse.Namespace(seed=0, seeds=2, more=1, quick=False)
    table = Table(tmp_path, arguments, KeptRuns(None, {}, finetuning.Setting, ()))
    contenders = [contender for contender in CONTENDERS if contender.name == name]
    won = search_all(table, contenders, TASKS, jobs=1)
    for task in TASKS:
        assert [run.lr for run in runs if run.task == task] == [*tried, rate]
        assert [run.seed for run in runs if run.task == task] == [0] * len(tried) + [1]
    row, largest = summary(table, won, contenders, TASKS)
    assert (row["optimizer"], row["functions"], row["order"], row["mean"]) == (name, *[pytest.approx(0.75)] * 3)
    assert (largest["optimizer"], largest["mean"]) == ("largest class", 0.5)
    assert row["state bytes"] == (16_000_000 if name == "AdamW" else 1000 + 8 * (2_000_000 - 1_769_472))
    swept = rates(table, won)
    assert [(line["task"], line["lr"], line["seeds"]) for line in swept] == [
        (task, rate, "0.800, 0.700") for task in ("functions", "order")
    ]
    assert swept[0]["half"] == pytest.approx(-0.2)
    assert swept[0]["twice"] == (pytest.approx(-0.6) if name == "GaLore" else None)
