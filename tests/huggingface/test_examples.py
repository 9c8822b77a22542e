"""The examples of the Trainer, accelerate and TRL, and ``python -m ds_lowrank run``, as users start them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.pool import run_ranks
from tests.huggingface.scenario import max_difference
from tests.unit.test_examples import load

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def trained(name, folder):
    """This rank's weights after the example's steps, and the losses that the Trainer logged."""
    import torch.distributed as dist

    trainer = load(name).train(str(folder), dist.get_world_size())
    weights = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    return weights, [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize(("name", "last"), [("hf_trainer", 0.2), ("trl_sft", 0.9)])
def test_the_examples_of_trainers_learn_and_two_ranks_train_the_same_model(tmp_path, name, last):
    """Counting and sums are learned from losses of 4.2 and 3.8, the logarithms of the vocabularies."""
    ((weights, losses),) = run_ranks(1, trained, name, tmp_path / "one")
    assert losses[0] > 2 > 1 > losses[-1] and losses[-1] < last
    for other, logged in run_ranks(2, trained, name, tmp_path / "two"):
        # A hundred steps by gradients that are summed in another order: as for the other examples.
        assert max_difference(other, weights) < 1e-3
        assert logged == pytest.approx(losses, rel=1e-3)


def environment():
    named = {key: value for key, value in os.environ.items() if not re.match("RANK|WORLD_SIZE|ACCELERATE_", key)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return named | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}


def started(*command, check=True, **variables):
    done = subprocess.run(command, env=environment() | variables, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def test_accelerate_launch_trains_on_two_ranks():
    out = started(
        *("accelerate", "launch", "--main_process_port", "0", "--config_file", "examples/accelerate_zero2.yaml"),
        "examples/accelerate_loop.py",
    ).stdout
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 5 and losses[-1] < 0.2
    assert "'lowrank/projected_matrices': 14" in out  # seven of each of two layers


UNCHANGED = """
import sys, deepspeed, torch
from ds_lowrank.training.distributed import join, leave
join()
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
config = {"train_batch_size": 4, "zero_optimization": {"stage": 2},
          "optimizer": {"type": "GaLore", "params": {"rank": 2}}}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
engine.backward(engine(torch.ones(4, 16)).sum())
engine.step()
print(sys.argv[1:], engine.basic_optimizer.metrics()["lowrank/projected_matrices"])
leave()
"""


@pytest.mark.parametrize("as_module", [False, True])
def test_a_program_that_knows_nothing_of_us_is_run_with_the_methods(tmp_path, as_module):
    (tmp_path / "unchanged.py").write_text(UNCHANGED)
    program = ["-m", "unchanged"] if as_module else [str(tmp_path / "unchanged.py")]
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = started(sys.executable, "-m", "ds_lowrank", "run", *program, "--config", "x.yaml", **path)
    assert "['--config', 'x.yaml'] 2" in done.stdout


def test_a_program_that_does_not_exist_is_one_line():
    done = started(sys.executable, "-m", "ds_lowrank", "run", "nowhere.py", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "python -m ds_lowrank run: there is no file nowhere.py; for a module give -m"
    )
