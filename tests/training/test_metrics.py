import errno
import json
import sys
from types import SimpleNamespace

import pytest
from matplotlib import image

from ds_lowrank.training.console import OutputError
from ds_lowrank.training.metrics import Reporter, console_line
from ds_lowrank.training.output import begin_output, check_output, write_results
from ds_lowrank.training.plot import plot_loss
from ds_lowrank.training.records import read_metrics


def record(step, **more):
    return {
        "step": step,
        "tokens": 100 * step,
        "loss": 5.0 - step,
        "grad_norm": 1.5,
        "lr": 0.01,
        "tokens_per_second": 1000.0,
        "tokens_per_second_per_gpu": 500.0,
        "tflops_per_gpu": 0.04891,
        "mfu": None,
        "seconds": 0.1 * step,
        "remaining_seconds": 65.4,
        "memory_gib": 0.5,
        "skipped_steps": 0,
        **more,
    }


def engine(rank=0):
    written = []
    monitor = SimpleNamespace(enabled=True, write_events=written.extend)
    return SimpleNamespace(global_rank=rank, global_samples=32, monitor=monitor, written=written)


def test_a_record_reaches_the_file_the_console_and_the_monitor(tmp_path, capsys):
    fake = engine()
    with Reporter(tmp_path, fake, steps=10) as report:
        report.record(record(3, eval_loss=2.5))
    assert read_metrics(tmp_path / "metrics.jsonl") == [record(3, eval_loss=2.5)]
    assert capsys.readouterr().out == (
        "step 3/10 | loss 2.0000 | grad 1.500 | lr 1.0e-02 | 0.5 GiB | 500 tok/s/GPU | 0.0489 TFLOPS | 1m05s left "
        "| eval loss 2.5000\n"
    )
    assert ("Train/Samples/loss", 2.0, 32) in fake.written
    assert ("Train/Samples/eval_loss", 2.5, 32) in fake.written
    assert "Train/Samples/mfu" not in {name for name, _, _ in fake.written}  # it is not known


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "| 5s left"), (600, "| 10m left"), (3725, "| 1h02m left"), (180_000, "| 2d02h left")],
)
def test_the_line_of_a_long_run_on_a_card_fits_on_a_terminal(seconds, text):
    fields = {"tokens_per_second_per_gpu": 9_474.0, "memory_gib": 48.79, "tflops_per_gpu": 412.3, "mfu": 0.4168}
    line = console_line(record(1200, loss=6.6354, **fields, remaining_seconds=seconds), 10_000)
    assert "| 48.8 GiB | 9,474 tok/s/GPU | 412 TFLOPS | MFU 42% |" in line
    assert line.endswith(text)
    assert len(line) <= 120


def test_what_is_not_known_is_not_in_the_line():
    line = console_line(record(10, grad_norm=None, tflops_per_gpu=None, remaining_seconds=None), 10)
    assert line == "step 10/10 | loss -5.0000 | grad - | lr 1.0e-02 | 0.5 GiB | 500 tok/s/GPU"


def test_what_is_not_finite_is_null_in_the_file_and_skipped_steps_are_shown(tmp_path, capsys):
    with Reporter(tmp_path, engine(), steps=10) as report:
        report.record(record(1, loss=float("nan"), grad_norm=float("inf"), skipped_steps=2))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record(1, loss=None, grad_norm=None, skipped_steps=2)
    line = capsys.readouterr().out
    assert "loss nan" in line and "grad inf" in line and "2 skipped" in line


def test_a_full_disk_is_said_in_one_line_that_names_the_file(tmp_path, monkeypatch):
    def fail(*written):
        raise OSError(errno.ENOSPC, "No space left on device")

    full = SimpleNamespace(write=fail, flush=fail, close=fail)
    with Reporter(tmp_path, engine(), steps=10) as report:
        monkeypatch.setattr(report, "_file", full)
        with pytest.raises(OutputError, match=r"metrics.jsonl cannot be written: No space left on device; make room"):
            report.record(record(1))
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OutputError, match=r"^the console output cannot be written: No space left on device"):
            report.say("saved")
        monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/metrics.jsonl cannot be written: .*continue with --resume"):
        Reporter(tmp_path / "file", engine(), steps=10)


def test_other_ranks_write_nothing(tmp_path, capsys):
    with Reporter(tmp_path / "absent", engine(rank=1), steps=10) as report:
        report.record(record(1))
    assert not (tmp_path / "absent").exists()
    assert capsys.readouterr().out == ""


def test_a_resumed_run_drops_later_records_and_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(record(step)) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + "\n" + lines[0][:20])
    with Reporter(tmp_path, engine(), steps=10, resumed_at=2) as report:
        report.record(record(3, loss=9.0))
    assert read_metrics(path) == [record(1), record(2), record(3, loss=9.0)]


def test_damage_elsewhere_in_the_file_is_named(tmp_path):
    for damaged, message in (
        (b"not json", "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
        (b"5", "not a record of a step"),
        (b'{"step": "2"}', "not a record of a step"),
        (b"{}", "not a record of a step"),
    ):
        good = json.dumps(record(1)).encode()
        (tmp_path / "metrics.jsonl").write_bytes(good + b"\n" + damaged + b"\n" + good + b"\n")
        with pytest.raises(ValueError, match=f"metrics.jsonl, line 2: {message}; repair or remove that line"):
            check_output(tmp_path, resuming=True)


def test_an_output_that_holds_a_run_is_not_overwritten(tmp_path):
    check_output(tmp_path, resuming=False)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n")
    check_output(tmp_path, resuming=False)  # nothing was saved: it can only be started again
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"already contains a run \(metrics.jsonl\)"):
        check_output(tmp_path, resuming=False)
    check_output(tmp_path, resuming=True)


def test_the_metrics_of_an_interrupted_start_are_kept_aside(tmp_path):
    for text in ("first\n", "second\n", ""):
        (tmp_path / "metrics.jsonl").write_text(text)
        begin_output(tmp_path)
    assert (tmp_path / "metrics.1.jsonl").read_text() == "first\n"
    assert (tmp_path / "metrics.2.jsonl").read_text() == "second\n"
    assert not (tmp_path / "metrics.3.jsonl").exists()


def test_results_of_no_record_say_so(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    write_results(tmp_path, steps=2)
    assert "has no record: there is nothing to plot" in capsys.readouterr().out
    assert not (tmp_path / "summary.json").exists()


def test_the_summary_is_of_the_last_step(tmp_path, capsys):
    records = [record(1, eval_loss=4.5), record(2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in records))
    write_results(tmp_path, steps=2)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "finished": True,
        "step": 2,
        "tokens": 200,
        "seconds": 0.2,
        "tokens_per_second": 1000.0,
        "loss": 3.0,
        "eval_loss": 4.5,
        "memory_gib": 0.5,
        "skipped_steps": 0,
    }
    assert "finished: True" in capsys.readouterr().out
    write_results(tmp_path, steps=3)
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is False


@pytest.mark.parametrize("records", [[record(1), record(2, eval_loss=4.0)], [record(1, loss=None)], []])
def test_the_plot_is_a_png_even_without_points(tmp_path, records):
    plot_loss(records, tmp_path / "loss.png")
    pixels = image.imread(tmp_path / "loss.png")
    assert pixels.shape[:2] == (600, 960)
    assert pixels.min() < 0.2 < pixels.max()  # ink on paper
