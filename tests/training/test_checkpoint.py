"""Manifests and the store, with a stand-in for the engine and, where it matters, real engines on two ranks."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from ds_lowrank.checkpoint import disk, folder, manifest
from ds_lowrank.checkpoint.choose import check_unused, check_whole, find_checkpoint, set_aside_newer
from ds_lowrank.checkpoint.folder import list_checkpoints
from ds_lowrank.checkpoint.manifest import FILE, Identity, Progress, check_identity, read_manifest, seal
from ds_lowrank.checkpoint.owned import delete_owned, make_owned, replace_owned
from ds_lowrank.checkpoint.random_state import get_random_state, seed_everything, set_random_state
from ds_lowrank.checkpoint.store import load_checkpoint, save_checkpoint
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
    """The part of DeepSpeed's checkpoint engine that is used; `error` is raised by every write."""

    error = None

    def save(self, state_dict, path):
        if self.error:
            Path(path).write_bytes(b"cut sh")
            raise self.error
        torch.save(state_dict, path)

    def load(self, path, map_location=None):
        return torch.load(path, weights_only=False)  # as DeepSpeed 0.19.8 does


class Engine:
    def __init__(self):
        self.checkpoint_engine = Files()
        self.optimizer = SimpleNamespace()

    def save_checkpoint(self, directory, tag, client_state, save_latest):
        for name in ("model_states.pt", "optim_states.pt"):
            self.checkpoint_engine.save(client_state, f"{directory}/{tag}/{name}")
        Path(directory, "zero_to_fp32.py").write_text("script")

    def load_checkpoint(self, directory, tag):
        return directory, self.checkpoint_engine.load(f"{directory}/{tag}/model_states.pt")


def save(directory, step, engine=None, keep=2):
    progress = Progress(step, 100 * step, 0.5)
    return save_checkpoint(engine or Engine(), directory, IDENTITY, progress, {"data": step}, keep)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint = save(tmp_path / "new" / "folder", 3)
    check_identity(checkpoint, check_whole(checkpoint, checkpoint.parent), IDENTITY)
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


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "; make room on the disk"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "; is the disk full?"),
        (PermissionError(errno.EACCES, "Permission denied"), ""),
    ],
)
def test_a_failed_write_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, error, advice):
    save(tmp_path, 1)
    before = names(tmp_path)
    engine = Engine()
    engine.checkpoint_engine.error = error
    message = f"global_step2 was not saved: {error}{advice}. Earlier checkpoints are intact"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        save(tmp_path, 2, engine)
    assert names(tmp_path) == before
    assert (tmp_path / "latest").read_text() == "global_step1"
    check_whole(find_checkpoint(tmp_path, ""), tmp_path)
    engine.checkpoint_engine.error = None
    assert save(tmp_path, 2, engine).name == "global_step2"


def test_a_kill_before_the_rename_leaves_nothing_that_counts(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
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
        check_identity(checkpoint, read_manifest(checkpoint), dataclasses.replace(IDENTITY, **change))


def flip(path, offset=-1):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def edit_manifest(checkpoint, change):
    """Change manifest.json, and its checksums with it."""
    path = checkpoint / FILE
    content = json.loads(path.read_text())
    change(content)
    for name in content["files"]:
        if (checkpoint / name).is_file():
            content["files"][name] = seal(checkpoint / name).model_dump()
    content.pop("checksum", None)
    content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip(path / "optim_states.pt"), "optim_states.pt is not as it was saved"),
        (lambda path: flip(path / "rank_0.pt", 100), "rank_0.pt is not as it was saved"),
        (lambda path: (path / "optim_states.pt").write_bytes(b"short"), "has 5 bytes instead of [0-9]+"),
        (lambda path: (path / "optim_states.pt").unlink(), "optim_states.pt is missing"),
        (lambda path: (path / "extra_states.pt").write_bytes(b""), "extra_states.pt was not saved with it"),
        (lambda path: (path / FILE).write_text("{"), "manifest.json is not a manifest"),
        (lambda path: (path / FILE).unlink(), "not a complete checkpoint: it has no manifest.json"),
        (
            lambda path: (path / FILE).write_text((path / FILE).read_text().replace("300", "301")),
            "manifest.json is not as it was saved",
        ),
        (lambda path: edit_manifest(path, lambda m: m["progress"].update(step="3")), "progress.step of manifest.json"),
        (lambda path: edit_manifest(path, lambda m: m["progress"].update(seconds=math.nan)), "progress.seconds"),
        (lambda path: edit_manifest(path, lambda m: m["progress"].update(step=4)), "it was saved after step 4"),
        (lambda path: edit_manifest(path, lambda m: m["files"].update({"../x": {}})), "not the name of a file"),
        (lambda path: edit_manifest(path, lambda m: m.pop("run")), "run of manifest.json: Field required"),
    ],
)
def test_damage_is_named_with_the_checkpoint_to_use_instead(tmp_path, damage, message):
    save(tmp_path, 1)
    checkpoint = save(tmp_path, 3)
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=rf"{message}.*; --resume global_step1 continues from the newest whole"):
        check_whole(checkpoint, tmp_path)
    flip(tmp_path / "global_step1" / "rank_0.pt")
    with pytest.raises(CheckpointError, match=rf"{message}.*; resume from another checkpoint, or start again"):
        check_whole(checkpoint, tmp_path)


def test_a_checkpoint_of_another_version_is_not_read(tmp_path):
    checkpoint = save(tmp_path, 1)
    (checkpoint / FILE).write_text(json.dumps({"format": 3}))
    with pytest.raises(CheckpointError, match="has format 3, but this version reads format 5"):
        check_whole(checkpoint, tmp_path)


def test_past_a_damaged_checkpoint_the_run_goes_on_from_an_older_one(tmp_path):
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "rank_0.pt")
    (tmp_path / "global_step3").mkdir()
    assert find_checkpoint(tmp_path, "global_step1") == tmp_path / "global_step1"
    set_aside_newer(tmp_path, 1)
    aside = ["global_step2.damaged", "global_step3.damaged"]
    assert names(tmp_path) == ["global_step1", *aside, "latest", "zero_to_fp32.py"]
    assert save(tmp_path, 2).name == "global_step2"
    flip(tmp_path / "global_step2" / "rank_0.pt")
    set_aside_newer(tmp_path, 1)
    assert "global_step2.damaged2" in names(tmp_path)


def test_a_folder_of_checkpoints_is_of_one_run(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    check_unused(ours)
    ours.mkdir()
    (ours / "latest").write_text("epoch1")
    for choose in (lambda: check_unused(ours), lambda: find_checkpoint(ours, "")):
        with pytest.raises(FileExistsError, match="latest is in the way: it names a checkpoint that is not there, or"):
            choose()
    (ours / "latest").unlink()
    origin = save(theirs, 3)
    with pytest.raises(CheckpointError, match=r"already has checkpoints \(global_step3\); give --resume"):
        check_unused(theirs)
    assert find_checkpoint(ours, "") is None
    assert find_checkpoint(ours, str(origin)) == origin
    save(ours, 5)
    assert find_checkpoint(ours, str(origin)) == ours / "global_step5"  # the same command after a kill
    save(ours, 2)
    with pytest.raises(CheckpointError, match=r"did not start from .*global_step3 \(global_step2\); give another"):
        find_checkpoint(ours, str(origin))


def test_only_what_the_package_wrote_is_deleted(tmp_path):
    foreign = tmp_path / ".global_step1.partial"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("draft")
    with pytest.raises(FileExistsError, match=r"global_step1\.partial is in the way"):
        check_unused(tmp_path)
    with pytest.raises(CheckpointError, match="is in the way"):
        save(tmp_path, 1)
    assert (foreign / "thesis.tex").read_text() == "draft"
    (tmp_path / "latest").write_text("epoch1")
    with pytest.raises(FileExistsError, match="is in the way"):
        check_unused(tmp_path)
    (tmp_path / "latest").unlink()
    foreign.rename(tmp_path / ".notes.partial")  # not the name of anything of ours
    (save(tmp_path, 1) / "notes.txt").write_text("the best run")
    for step in (2, 3, 4):
        save(tmp_path, step)
    kept = [".notes.partial", "global_step1", "global_step3", "global_step4", "latest", "zero_to_fp32.py"]
    assert names(tmp_path) == kept


def test_a_replaced_folder_to_which_a_file_was_added_is_kept(tmp_path):
    export, aside = tmp_path / "export", tmp_path / ".export.partial"

    def replace(content):
        make_owned(aside)
        (aside / "weights").mkdir()
        (aside / "weights" / "model").write_text(content)
        replace_owned(aside, export)

    replace("1")
    replace("2")
    assert names(tmp_path) == ["export"]
    (export / "weights" / "run").mkdir()
    (export / "weights" / "run" / "metrics.jsonl").write_text("{}")
    replace("3")
    (export / "notes").symlink_to(tmp_path)
    replace("4")
    assert names(tmp_path) == ["export", "export.1", "export.2"]
    contents = [(tmp_path / name / "weights" / "model").read_text() for name in names(tmp_path)]
    assert contents == ["4", "2", "3"]
    assert (tmp_path / "export.1" / "weights" / "run" / "metrics.jsonl").read_text() == "{}"
    for kept in ("export.1", "export.2"):
        with pytest.raises(FileExistsError, match="is in the way"):
            delete_owned(tmp_path / kept)


class Bomb:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["model_states.pt", "optim_states.pt", "rank_0.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_runs_no_code(tmp_path, name, zipped):
    checkpoint = save(tmp_path, 1)
    ran = tmp_path / "ran"
    torch.save({"progress": Bomb(str(ran))}, checkpoint / name, _use_new_zipfile_serialization=zipped)
    edit_manifest(checkpoint, lambda _: None)
    check_whole(checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match=rf"{name} does not contain the data of a checkpoint \(it names .*mkdir"):
        load_checkpoint(Engine(), checkpoint)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rank": 1, "progress": {"step": 3, "tokens": 300}, "state": {}}, "rank_0.pt is not of rank 0"),
        ({"rank": 0, "progress": {"step": 2, "tokens": 200}, "state": {}}, "rank_0.pt is of step 2, the manifest of"),
        ({"progress": {"step": 2, "tokens": 200}}, "DeepSpeed's files is of step 2, the manifest of step 3"),
    ],
)
def test_files_of_other_ranks_and_steps_are_refused(tmp_path, content, message):
    checkpoint = save(tmp_path, 3)
    torch.save(content, checkpoint / ("rank_0.pt" if "rank" in content else "model_states.pt"))
    edit_manifest(checkpoint, lambda _: None)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(Engine(), checkpoint)


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Files and folders are flushed before the rename; the names in SAVE after it, and before an older one goes."""
    save(tmp_path, 1)
    events = []

    def flushed(path):
        events.append(Path(path).relative_to(tmp_path).as_posix())

    rename = Path.rename

    def renamed(path, target):
        events.append(f"rename {path.name}")
        return rename(path, target)

    for module in (disk, manifest, folder):
        monkeypatch.setattr(module, "flush", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path, 2, keep=1)
    inside = ".global_step2.partial/global_step2"
    files = [f"{inside}/{name}" for name in ("model_states.pt", "optim_states.pt", "rank_0.pt", FILE)]
    assert events[:5] == [*files, inside]
    assert events[5:] == [".global_step2.partial/latest", "rename global_step2", ".", "rename global_step1"]


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
