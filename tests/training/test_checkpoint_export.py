"""Checkpoints of launch/pretrain.py: their export is the run's own, and those of AdamW become ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_lowrank.checkpoint.convert import Wanted, convert
from ds_lowrank.checkpoint.listing import rows
from ds_lowrank.checkpoint.verify import verify
from tests.engines.test_any_grid import tensors_of
from tests.training.runs import Workspace, deepspeed_config

pytestmark = pytest.mark.slow


def finished(path: Path, optimizer: str) -> Path:
    """A run that has saved its last step and exported it; the folder of its checkpoints."""
    workspace = Workspace.make(path)
    config = deepspeed_config(optimizer)
    done = workspace.run_forked([*workspace.arguments("run", config=config), "--save-interval", "3", "--export"], 2)
    assert done.returncode == 0, done.stderr
    return path / "run" / "checkpoints"


def test_the_export_of_a_checkpoint_is_that_of_the_run(tmp_path):
    checkpoints = finished(tmp_path, "GaLore")
    convert(checkpoints, tmp_path / "out", Wanted(to="huggingface"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_run_with_adamw_is_listed_and_becomes_one_of_ours(tmp_path):
    checkpoints = finished(tmp_path, "AdamW")
    assert [(row[0], row[6], row[7]) for row in rows(checkpoints)][-1] == ("global_step6", "AdamW", "whole")
    assert "as they were saved" in verify(checkpoints / "global_step6")
    convert(checkpoints, tmp_path / "out", Wanted(to="ours"))
    found = tensors_of(tmp_path / "out" / "global_step0")
    for name, tensor in load_file(tmp_path / "run" / "export" / "model.safetensors").items():
        assert torch.equal(found[name], tensor)
        assert found[f"{name}/exp_avg"].shape == tensor.shape
