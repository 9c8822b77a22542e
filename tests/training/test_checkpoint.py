"""Manifests and the store, with a stand-in for the engine and, where it matters, real engines on two ranks."""

import dataclasses
import errno
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from ds_lowrank.checkpoint import store
from ds_lowrank.checkpoint.manifest import Identity, check_manifest
from ds_lowrank.checkpoint.random_state import get_random_state, seed_everything, set_random_state
from ds_lowrank.checkpoint.store import Progress, find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from ds_lowrank.errors import CheckpointError
from tests.engines.pool import run_ranks

IDENTITY = Identity(
    model={"hidden_size": 32},
    optimizer="GaLore",
    optimizer_params={"lr": 0.01, "betas": (0.9, 0.99)},
    precision="fp32",
    zero_stage=2,
    ranks=1,
    tensor_parallel=1,
    autotp_size=1,
    pipeline_parallel=1,
    sequence_length=32,
    train_batch_size=8,
    micro_batch_size=2,
    seed=0,
)


class Files:
    """The part of DeepSpeed's checkpoint engine that is used; `full` makes every write fail as on a full disk."""

    full = False

    def save(self, state_dict, path):
        if self.full:
            Path(path).write_bytes(b"cut sh")
            raise OSError(errno.ENOSPC, "No space left on device")
        torch.save(state_dict, path)


class Engine:
    def __init__(self):
        self.checkpoint_engine = Files()
        self.optimizer = SimpleNamespace()

    def save_checkpoint(self, directory, tag, client_state, save_latest):
        for name in ("model_states.pt", "optim_states.pt"):
            self.checkpoint_engine.save(client_state, f"{directory}/{tag}/{name}")
        Path(directory, "zero_to_fp32.py").write_text("script")

    def load_checkpoint(self, directory, tag):
        return directory, torch.load(f"{directory}/{tag}/model_states.pt", weights_only=True)


def save(directory, step, engine=None, keep=2):
    progress = Progress(step, 100 * step, 0.5)
    return save_checkpoint(engine or Engine(), directory, IDENTITY, progress, {"data": step}, keep)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint = save(tmp_path / "new" / "folder", 3)
    check_manifest(checkpoint, IDENTITY)
    assert load_checkpoint(Engine(), checkpoint) == (Progress(3, 300, 0.5), {"data": 3})
    assert names(checkpoint.parent) == ["global_step3", "latest", "zero_to_fp32.py"]
    assert (checkpoint.parent / "latest").read_text() == "global_step3"


def test_the_newest_are_kept_in_order_of_their_step(tmp_path):
    for step in (8, 9, 10):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["global_step9", "global_step10"]
    assert find_checkpoint(tmp_path, "") == tmp_path / "global_step10"
    assert find_checkpoint(tmp_path, "global_step10") == tmp_path / "global_step10"
    assert find_checkpoint(tmp_path / "elsewhere", str(tmp_path / "global_step9")) == tmp_path / "global_step9"


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    before = names(tmp_path)
    engine = Engine()
    engine.checkpoint_engine.full = True
    with pytest.raises(CheckpointError, match=r"global_step2 was not saved: .*No space left on device"):
        save(tmp_path, 2, engine)
    assert names(tmp_path) == before
    assert (tmp_path / "latest").read_text() == "global_step1"
    check_manifest(find_checkpoint(tmp_path, ""), IDENTITY)
    engine.checkpoint_engine.full = False
    assert save(tmp_path, 2, engine).name == "global_step2"


def test_a_kill_before_the_rename_leaves_nothing_that_counts(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        save(tmp_path, 2)
    assert find_checkpoint(tmp_path, "").name == "global_step1"
    save(tmp_path, 3)
    assert names(tmp_path) == ["global_step1", "global_step3", "latest", "zero_to_fp32.py"]


def test_an_existing_checkpoint_is_not_overwritten(tmp_path):
    checkpoint = save(tmp_path, 1)
    before = (checkpoint / "rank_0.pt").read_bytes()
    with pytest.raises(CheckpointError, match="already exists and is not overwritten"):
        save(tmp_path, 1)
    assert (checkpoint / "rank_0.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("global_step1", "newer than global_step1"),
        ("global_step7", "no checkpoint 'global_step7'"),
        (".", "is not a checkpoint"),
    ],
)
def test_choices_that_cannot_be_resumed(tmp_path, choice, message):
    for step in (1, 2):
        save(tmp_path, step)
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(tmp_path, choice)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        find_checkpoint(tmp_path / "absent", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "AdamW"}, "optimizer: the checkpoint has 'GaLore', this run 'AdamW' .*optimizer.type"),
        ({"optimizer_params": {"lr": 0.02, "betas": (0.9, 0.99)}}, "has lr = 0.01, this run lr = 0.02"),
        ({"optimizer_params": {"lr": 0.01, "betas": (0.9, 0.99), "rank": 8}}, "has no rank, this run rank = 8"),
        ({"model": {"hidden_size": 64}}, "has hidden_size = 32, this run hidden_size = 64"),
        ({"zero_stage": 3}, "zero_stage: the checkpoint has 2, this run 3"),
        ({"ranks": 2}, "ranks: the checkpoint has 1, this run 2 .start as many ranks"),
        ({"sequence_length": 16, "seed": 1}, "sequence_length.*; seed"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path, change, message):
    checkpoint = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=message):
        check_manifest(checkpoint, dataclasses.replace(IDENTITY, **change))


def test_damage_is_named(tmp_path):
    checkpoint = save(tmp_path, 1)
    whole = (checkpoint / "optim_states.pt").read_bytes()
    (checkpoint / "optim_states.pt").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=rf"optim_states.pt has {len(whole) - 1} bytes instead of {len(whole)}"):
        check_manifest(checkpoint, IDENTITY)
    (checkpoint / "optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optim_states.pt is missing"):
        check_manifest(checkpoint, IDENTITY)
    (checkpoint / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        check_manifest(checkpoint, IDENTITY)
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="has format 99"):
        check_manifest(checkpoint, IDENTITY)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        check_manifest(checkpoint, IDENTITY)


def test_every_random_generator_continues_where_it_was(tmp_path):
    seed_everything(3)
    torch.save(get_random_state(), tmp_path / "state.pt")
    drawn = [random.random(), numpy.random.rand(), torch.rand(1).item()]
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [random.random(), numpy.random.rand(), torch.rand(1).item()] == drawn


def _disk_full_on_one_rank(directory: Path, zero_stage: int, fails: str) -> str:
    import deepspeed

    model = torch.nn.Linear(4, 4)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        "zero_optimization": {"stage": zero_stage},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    identity = dataclasses.replace(IDENTITY, ranks=2)
    save_checkpoint(engine, directory, identity, Progress(1, 1, 1.0), {}, keep=2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "states" and engine.global_rank == 1:
        type(engine.checkpoint_engine).save = full
    if fails == "scripts" and engine.global_rank == 0:
        engine._copy_recovery_script = full
    try:
        save_checkpoint(engine, directory, identity, Progress(2, 2, 1.0), {}, keep=2)
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("fails", ["states", "scripts"])
def test_a_disk_full_on_one_rank_is_an_error_on_both_and_nothing_hangs(tmp_path, zero_stage, fails):
    for message in run_ranks(2, _disk_full_on_one_rank, tmp_path, zero_stage, fails):
        assert "global_step2 was not saved" in message and "No space left on device" in message
    assert names(tmp_path) == ["global_step1", "latest", "zero_to_fp32.py", "zero_to_torch.py"]
