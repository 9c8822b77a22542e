"""DeepSpeed's own files are data for ``read_data``: every wrapper, precision and scheduler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engines.pool import run_ranks
from tests.engines.scenario import config, full_weights, make_model, train_step

SCHEDULERS = {
    "LRRangeTest": {"lr_range_test_min_lr": 1e-3},
    "OneCycle": {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 2},
    "WarmupLR": {"warmup_max_lr": 1e-2, "warmup_num_steps": 2},
    "WarmupDecayLR": {"warmup_max_lr": 1e-2, "warmup_num_steps": 2, "total_num_steps": 9},
    "WarmupCosineLR": {"warmup_num_steps": 2, "total_num_steps": 9},
}


def saved_and_read(settings, directory):
    """Save, read every file with ``read_data``, and load into a new engine: whether its weights are the same."""
    import ds_lowrank
    from ds_lowrank.checkpoint.restricted_load import read_data, restricted

    engine, *_ = ds_lowrank.initialize(model=make_model(), config=settings)
    train_step(engine, 0)
    engine.save_checkpoint(directory, tag="here", client_state={"progress": {"step": 1}})
    torch.distributed.barrier()
    for path in sorted(Path(directory, "here").glob("*.pt")):
        read_data(path, "meta")
    again, *_ = ds_lowrank.initialize(model=make_model(), config=settings)
    with restricted(again):
        again.load_checkpoint(directory, tag="here")
    assert "load" not in vars(again.checkpoint_engine)
    ours, theirs = full_weights(again), full_weights(engine)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("stage", "dtype", "scheduler"),
    [
        (0, "fp32", "LRRangeTest"),
        (0, "bf16", "OneCycle"),
        (1, "bf16_fp32_accumulation", "WarmupLR"),
        (1, "fp32", "WarmupDecayLR"),
        (2, "bf16", "WarmupCosineLR"),
        (3, "fp32", "OneCycle"),
        (3, "bf16", "WarmupLR"),
    ],
)
def test_what_deepspeed_saves_is_read_without_running_it(stage, dtype, scheduler, tmp_path):
    settings = config(stage, 2, dtype, scheduler={"type": scheduler, "params": SCHEDULERS[scheduler]})
    assert run_ranks(2, saved_and_read, settings, str(tmp_path)) == [True, True]


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_loss_scale_of_fp16_is_data(dynamic, tmp_path):
    """DeepSpeed's fp16 does not run on every CPU; its files differ by the loss scaler, which is a Python object."""
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    from ds_lowrank.checkpoint.restricted_load import read_data

    arguments = {"init_scale": 2**16, "scale_window": 5, "min_scale": 1, "delayed_shift": 2}
    arguments["consecutive_hysteresis"] = False
    scaler = CreateLossScaler(torch.float16, 128.0, dynamic, arguments)
    torch.save({"loss_scaler": scaler}, tmp_path / "optim_states.pt")
    read = read_data(tmp_path / "optim_states.pt")["loss_scaler"]
    assert type(read) is type(scaler) and vars(read) == vars(scaler)


class Getattr:
    """Is pickled as ``getattr`` of something."""

    def __init__(self, owner, name):
        self.reduced = getattr, (owner, name)

    def __reduce__(self):
        return self.reduced


def test_a_stage_that_another_python_has_written_is_data(tmp_path):
    """Python 3.11.2, Debian 12's, pickles members of enumerations by name; 3.11.7 and 3.12 do so by value."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    from ds_lowrank.checkpoint.restricted_load import read_data

    for stage in ZeroStageEnum:
        torch.save({"zero_stage": Getattr(ZeroStageEnum, stage.name)}, tmp_path / "optim_states.pt")
        assert read_data(tmp_path / "optim_states.pt") == {"zero_stage": stage}


def test_no_other_attribute_is_reached(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    from ds_lowrank.checkpoint.restricted_load import read_data
    from ds_lowrank.errors import CheckpointError

    for owner, name in ((ZeroStageEnum, "__subclasses__"), (LossScaler, "backward")):
        torch.save({"zero_stage": Getattr(owner, name)}, tmp_path / "optim_states.pt")
        with pytest.raises(CheckpointError, match=rf"\(it names the attribute {name}\); nothing in it was run"):
            read_data(tmp_path / "optim_states.pt")
