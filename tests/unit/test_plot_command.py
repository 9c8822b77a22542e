"""``python -m ds_lowrank plot``: what is drawn, and what it says of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from ds_lowrank import __main__
from ds_lowrank.commands.plot import named
from ds_lowrank.training import plot as drawing


def record(step, **more):
    fields = {"tokens": 100 * step, "loss": 5.0 - step, "seconds": 1800.0 * step, "memory_gib": 0.5}
    return {"step": step, "skipped_steps": 0, **fields, **more}


def write(folder, records):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in records))
    return folder


@pytest.fixture
def runs(tmp_path):
    write(tmp_path / "a", [record(1), record(2, eval_loss=2.9), record(3, loss=None), record(4, eval_loss=0.9)])
    write(tmp_path / "b", [record(1), record(2)])
    return tmp_path


def plot(monkeypatch, capsys, *arguments):
    """Exit code, output and errors of the command, and the figures that it saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        drawing.Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k))
    )
    monkeypatch.setattr(sys, "argv", ["ds_lowrank", "plot", *map(str, arguments)])
    code = __main__.main()
    return code, capsys.readouterr(), figures


def curves(axes):
    return {line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in axes.lines}


def test_three_panels_hold_the_curves_of_all_runs(runs, monkeypatch, capsys):
    output = runs / "both.png"
    code, printed, (figure,) = plot(monkeypatch, capsys, runs / "a", runs / "b" / "metrics.jsonl", "--output", output)
    assert (code, printed.out, printed.err) == (0, f"wrote {output}\n", "")
    steps, tokens, hours = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == ["optimizer steps", "tokens", "hours of training"]
    assert curves(steps) == {
        "a, loss": [(1, 4), (2, 3), (4, 1)],
        "a, eval loss": [(2, 2.9), (4, 0.9)],
        "b, loss": [(1, 4), (2, 3)],
    }
    assert curves(tokens)["b, loss"] == [(100, 4), (200, 3)]
    assert curves(hours)["a, eval loss"] == [(1, 2.9), (2, 0.9)]
    colors = {line.get_label(): line.get_color() for line in steps.lines}
    assert colors["a, loss"] == colors["a, eval loss"] != colors["b, loss"]
    assert [text.get_text() for text in steps.get_legend().get_texts()] == list(curves(steps))
    pixels = image.imread(output)
    assert pixels.shape[1] > 1.5 * pixels.shape[0] and pixels.min() < 0.2 < pixels.max()


def test_one_panel_of_one_run_needs_no_names(runs, monkeypatch, capsys):
    output = runs / "one.PNG"
    code, _, (figure,) = plot(monkeypatch, capsys, runs / "a", "--x", "hours", "--output", output)
    assert code == 0 and output.stat().st_size
    (axes,) = figure.axes
    assert curves(axes).keys() == {"loss", "eval loss"} and curves(axes)["loss"][-1] == (2, 1)


def test_runs_are_told_apart_by_the_ends_of_their_paths():
    paths = [Path("x/galore/metrics.jsonl"), Path("x/apollo")]
    assert named(paths) == {"galore": paths[0], "apollo": paths[1]}
    paths = [Path("one/run"), Path("two/run")]
    assert named(paths) == {"one/run": paths[0], "two/run": paths[1]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent does not exist: give the --output folder of a run"),
        (["empty"], "empty has no metrics.jsonl: give the --output folder of a run"),
        (["begun"], "begun/metrics.jsonl has no losses yet: the run has not logged a step"),
        (["damaged"], "damaged/metrics.jsonl, line 1: not a JSON object; repair or remove that line"),
        (["a", "b", "a/metrics.jsonl"], "a/metrics.jsonl is given twice"),
        (["a", "--output", "a.pdf"], "--output a.pdf: it is written as PNG, so let it end in .png"),
        (["a", "--output", "no/a.png"], "--output no/a.png: there is no folder no"),
        (["a", "--output", "folder.png"], "[Errno 21] Is a directory: 'folder.png'"),
    ],
)
def test_bad_input_is_one_line(runs, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(runs)
    (runs / "empty").mkdir()
    (runs / "folder.png").mkdir()
    write(runs / "begun", [])
    (write(runs / "damaged", []) / "metrics.jsonl").write_text("{\n" + json.dumps(record(1)) + "\n")
    code, printed, _ = plot(monkeypatch, capsys, *arguments)
    assert (code, printed.out, printed.err) == (1, "", f"error: {message}\n")


def test_without_matplotlib_it_says_what_to_install(runs, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "ds_lowrank.training.plot")
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    code, printed, _ = plot(monkeypatch, capsys, runs / "a")
    assert (code, printed.err) == (1, "error: plot needs matplotlib: pip install '.[train]'\n")


@pytest.mark.slow
def test_it_starts_without_deepspeed_and_torch_distributed(runs):
    code = (
        "import sys; sys.argv = ['ds_lowrank', 'plot', *sys.argv[1:]]; from ds_lowrank.__main__ import main;"
        "assert main() == 0; assert not {'deepspeed', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(runs / "a"), "--output", str(runs / "x.png")]
    subprocess.run(command, check=True, capture_output=True)
