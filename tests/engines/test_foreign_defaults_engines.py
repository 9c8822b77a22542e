"""Torch's default dtype and default device change no bit of a training run under real engines."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.engines import grids
from tests.engines.grids import Grid, settings_of
from tests.engines.pool import run_ranks
from tests.engines.scenario import config, full_weights, make_model, train_step
from tests.foreign import defaults

STEPS = 2
EVERY_STEP = {"GaLore": {"update_proj_gap": 1, "moments": "rotate"}, "AdaRankGrad": {"update_proj_gap": 1}}
"""Options with which the second step finds a new basis."""
DEFAULTS = {
    "bf16 on meta": {"dtype": torch.bfloat16, "device": "meta"},
    "fp64": {"dtype": torch.float64},
}


def changed_by_defaults(train):
    """The parameters that are not the same after training under torch's own defaults and under foreign ones."""
    plain, changed = train(defaults), {}
    for name, foreign in DEFAULTS.items():
        found = train(lambda foreign=foreign: defaults(**foreign))
        changed[name] = [key for key, weight in found.items() if not torch.equal(weight, plain[key])]
    return changed


def under_zero(settings):
    from deepspeed.accelerator import get_accelerator

    import ds_lowrank

    get_accelerator().is_fp16_supported = lambda: True  # on a CPU it is slow, and DeepSpeed refuses it there

    def train(context):
        model = make_model()
        with context():
            engine, *_ = ds_lowrank.initialize(model=model, config=settings)
            for step in range(STEPS):
                train_step(engine, step)
                optimizer = engine.basic_optimizer
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert not engine.skipped_steps
            return full_weights(engine)

    return changed_by_defaults(train)


CASES = [
    ("GaLore", 0, "fp32"),
    ("GaLore", 0, "bf16"),
    ("GaLore", 1, "bf16_fp32_accumulation"),
    ("GaLore", 2, "fp16"),
    ("GaLore", 3, "bf16"),
    ("GaLore", 3, "fp16"),
    ("VLoRP", 1, "fp32"),
    ("AdaRankGrad", 2, "bf16"),
    ("Lorenza", 3, "fp32"),
]


@pytest.mark.parametrize(("method", "stage", "dtype"), CASES)
def test_defaults_change_no_bit_under_any_wrapper(method, stage, dtype):
    settings = config(stage, 2, dtype, method=method, params=EVERY_STEP.get(method, {}))
    if dtype == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 8}
    for changed in run_ranks(2, under_zero, settings):
        assert changed == {name: [] for name in DEFAULTS}


def on_a_grid(grid, settings):
    from ds_lowrank.checkpoint.gather import whole_weights

    around_own_parts = grid.pipeline > 1 and enter_own_parts()

    def train(context):
        if around_own_parts:
            around_own_parts.append(context)
            context = defaults
        engine = grids.start(grid, settings, around=context)
        with context():
            for step in range(STEPS):
                grids.train_step(engine, step)
            return whole_weights(engine)

    return changed_by_defaults(train)


def enter_own_parts():
    """Make this package's parts of an engine run in the last context of the list that is returned.

    A PipelineEngine cannot start on the meta device, as it moves ``torch.tensor(0.0)`` to its own, and it receives
    losses, sent in fp32, in ``torch.Tensor([0.0, 0.0])`` (deepspeed/runtime/pipe/engine.py, 0.19.8). So the defaults
    are foreign only inside what is ours. The process is a rank of one test and ends with it.
    """
    from ds_lowrank.optimizer.optimizer import LowRankOptimizer
    from ds_lowrank.optimizer.perturbation import Perturbation

    contexts = [defaults]

    def within(method):
        def run(*args, **kwargs):
            with contexts[-1]():
                return method(*args, **kwargs)

        return run

    own = {
        LowRankOptimizer: ("__init__", "bind", "step"),
        Perturbation: ("_save", "probe", "mirror", "climb", "restore"),
    }
    for owner, names in own.items():
        for name in names:
            setattr(owner, name, within(getattr(owner, name)))
    return contexts


GRIDS = [
    (Grid(1, 2, 1, 0), "GradNormLoRP"),
    (Grid(1, 2, 1, 1, "autotp"), "GaLore"),
    (Grid(1, 1, 2, 0), "Lorenza"),
    (Grid(1, 2, 2, 1), "AdaRankGrad"),
]


@pytest.mark.parametrize(("grid", "method"), GRIDS, ids=str)
def test_defaults_change_no_bit_on_a_grid(grid, method):
    settings = settings_of(grid, clip=0.5, gas=2, method=method, params=EVERY_STEP.get(method, {}))
    for changed in run_ranks(grid.world, on_a_grid, grid, settings):
        assert changed == {name: [] for name in DEFAULTS}


def start_pipeline(dtype):
    torch.set_default_dtype(dtype)
    return grids.start_error(Grid(1, 1, 2, 0), settings_of(Grid(1, 1, 2, 0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_pipeline_is_refused_where_deepspeed_would_receive_losses_in_another_dtype(dtype):
    """In bf16 the process ends, in fp64 the losses of all but the last stage are noise."""
    for error in run_ranks(2, start_pipeline, dtype):
        assert f"receives them in torch's default dtype, which is {dtype}: call torch.set_default_dtype" in error
