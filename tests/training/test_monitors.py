"""DeepSpeed's monitors get every number of metrics.jsonl; one whose package is missing is refused in one line."""

import csv

import pytest

from tests.training.runs import deepspeed_config

SAMPLES_PER_STEP = 8


@pytest.fixture(scope="module")
def monitored(workspace):
    """Three steps on two ranks with an evaluation, into CSV files and TensorBoard; the records and the folder."""
    folder = workspace.path / "monitors"
    config = deepspeed_config(
        csv_monitor={"enabled": True, "output_path": str(folder), "job_name": "csv"},
        tensorboard={"enabled": True, "output_path": str(folder), "job_name": "tensorboard"},
    )
    arguments = [*workspace.arguments("monitored", config=config, steps=3), "--eval-interval", "2"]
    run = workspace.run_forked(arguments, ranks=2)
    assert run.returncode == 0, run.stderr
    return workspace.metrics("monitored"), folder


def numbers(records):
    """What every monitor should have: the values of each number, by its name and the samples seen."""
    found = {}
    for step, record in records.items():
        for key, value in record.items():
            if isinstance(value, int | float):
                found.setdefault(key, {})[step * SAMPLES_PER_STEP] = value
    expected = {"loss", "eval_loss", "tokens_per_second_per_gpu", "tflops_per_gpu", "reduce_seconds", "refresh_seconds"}
    assert expected <= found.keys() and found["eval_loss"].keys() == {16, 24}
    return found


def test_csv_files_have_every_number(monitored):
    records, folder = monitored
    for key, values in numbers(records).items():
        name = f"Train_Samples_{key}".replace("/", "_")
        header, *rows = csv.reader((folder / "csv" / f"{name}.csv").read_text().splitlines())
        assert header == ["step", key.rpartition("/")[2]]
        assert {int(samples): float(value) for samples, value in rows} == pytest.approx(values), key


def test_tensorboard_has_every_number(monitored):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records, folder = monitored
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for key, values in numbers(records).items():
        found = {event.step: event.value for event in events.Scalars(f"Train/Samples/{key}")}
        assert found == pytest.approx(values, rel=1e-6), key  # in fp32


@pytest.mark.parametrize(("monitor", "package"), [("wandb", "wandb"), ("comet", "comet_ml")])
def test_a_monitor_without_its_package_is_refused_on_every_rank(workspace, monitor, package):
    config = deepspeed_config(**{monitor: {"enabled": True}})
    run = workspace.run_forked(workspace.arguments("refused", config=config), ranks=2)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    advice = f"{monitor}.enabled needs the package {package}: pip install {package}, or set it to false"
    assert line.startswith("error: ") and line.endswith(advice)
    assert not (workspace.path / "refused").exists()
