"""Metrics against values worked out by hand, and which model is the best."""

import json
import math
from types import SimpleNamespace

import pytest

from ds_lowrank.errors import CheckpointError
from ds_lowrank.finetuning import best as best_module
from ds_lowrank.finetuning.best import Best
from ds_lowrank.finetuning.metrics import better, measure


def test_two_classes():
    # Two true positives, one false, one true negative, one false.
    found = measure(("accuracy", "f1", "mcc"), [1, 1, 0, 0, 1], [1, 0, 0, 1, 1])
    assert found == pytest.approx({"accuracy": 3 / 5, "f1": 2 / 3, "mcc": (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)})


def test_f1_is_that_of_class_one_and_does_not_see_true_negatives():
    assert measure(("f1",), [0, 0, 0, 1], [0, 0, 1, 1])["f1"] == pytest.approx(2 / 3)
    assert measure(("f1", "mcc"), [0, 0], [0, 1]) == {"f1": 0.0, "mcc": 0.0}


def test_three_classes():
    # Gorodkin's R_3 = (c s - sum p t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)), with c = 3 right of s = 4.
    found = measure(("accuracy", "mcc"), [0, 1, 2, 2], [0, 1, 2, 1])
    assert found == pytest.approx({"accuracy": 0.75, "mcc": (12 - 5) / math.sqrt((16 - 6) * (16 - 6))})


def test_numbers():
    found = measure(("pearson", "spearman"), [1.0, 2.0, 3.0], [1.0, 4.0, 2.0])
    # Deviations (-1, 0, 1) and (-4, 5, -1) / 3; ranks (1, 2, 3) and (1, 3, 2).
    assert found == pytest.approx({"pearson": 1 / math.sqrt(2 * 42 / 9), "spearman": 1 - 6 * 2 / (3 * 8)})
    assert all(math.isnan(value) for value in measure(("pearson", "spearman"), [1.0, 1.0], [1.0, 2.0]).values())


def test_what_is_better():
    assert better("accuracy", 0.5, None) and better("accuracy", 0.6, 0.5) and not better("accuracy", 0.5, 0.5)
    assert better("perplexity", 3.0, 4.0) and better("loss", 3.0, 4.0) and not better("loss", 4.0, 3.0)
    assert not better("pearson", math.nan, None)


@pytest.fixture
def exported(monkeypatch):
    """The steps whose models were written."""
    steps = []

    def export(engine, tokenizer, directory, notes):
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in notes.items():
            (directory / name).write_text(text)
        steps.append(json.loads(notes["best.json"])["step"])

    monkeypatch.setattr(best_module, "export", export)
    return steps


def kept(output, metric="accuracy"):
    return Best(SimpleNamespace(), SimpleNamespace(), output, metric)


def test_a_model_is_written_only_when_it_is_better(tmp_path, exported):
    best = kept(tmp_path)
    for step, value in enumerate([0.5, 0.4, 0.5, math.nan, 0.7], 1):
        best.consider(step, value)
    assert exported == [1, 5]
    assert best.found == json.loads((tmp_path / "best" / "best.json").read_text())
    assert best.found == {"metric": "accuracy", "value": 0.7, "step": 5}


def test_a_resumed_run_remembers_the_best_if_its_weights_are_still_there(tmp_path, exported):
    first = kept(tmp_path)
    first.consider(2, 0.5)
    state = first.state_dict()
    resumed = kept(tmp_path)
    resumed.load_state_dict(state)
    resumed.consider(4, 0.4)
    assert exported == [2]
    first.consider(3, 0.9)  # after the checkpoint: its weights have taken the place of those that are remembered
    resumed = kept(tmp_path)
    resumed.load_state_dict(state)
    assert resumed.found is None
    elsewhere = kept(tmp_path / "elsewhere")
    elsewhere.load_state_dict(state)
    elsewhere.consider(4, 0.4)
    assert exported == [2, 3, 4]
    (tmp_path / "best" / "best.json").write_text('{"metric"')
    with pytest.raises(CheckpointError, match=r"best\.json is damaged: delete .*best to continue without"):
        kept(tmp_path).load_state_dict(state)
