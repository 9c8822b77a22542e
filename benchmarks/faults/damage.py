"""Trials of damaged checkpoints: every kind of file, at ZeRO 0, 2 and 3, in pre-training and fine-tuning.

A run of six steps is made once, with checkpoints after steps 3 and 6. A trial copies what a kill after step 3 would
have left, damages it, and resumes. It must be refused in one line or end as the run did; nothing in a file may be run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.trial import Outcome, Trial
from benchmarks.faults.whole_run import Run, checkpoint, finished_run
from ds_lowrank.checkpoint.manifest import seal

Damage = Callable[[Path], object]
"""Damages a file, or the folder of a checkpoint."""

MANIFEST = "manifest.json"
FILES = {
    ("GaLore", 0): {"tensors": "rank_00001.safetensors", "common": "common.pt"},
    ("GaLore", 2): {"tensors": "rank_00000.safetensors", "common": "common.pt"},
    ("GaLore", 3): {"tensors": "rank_00001.safetensors", "common": "common.pt"},
    ("AdamW", 0): {"model": "mp_rank_00_model_states.pt", "rank": "rank_1.pt"},
    ("AdamW", 2): {
        "model": "mp_rank_00_model_states.pt",
        "optimizer": "zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "rank": "rank_0.pt",
    },
    ("AdamW", 3): {
        "model": "zero_pp_rank_1_mp_rank_00_model_states.pt",
        "optimizer": "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "rank": "rank_1.pt",
    },
}
"""One file of each kind, by optimizer and ZeRO stage."""


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Change a manifest as someone would who wants it to be believed: with all its checksums.

    Args:
        folder: the folder of the checkpoint, whose files may have changed.
        change: changes the manifest in place.
    """
    content = json.loads((folder / MANIFEST).read_text())
    for name in content["files"]:
        if (folder / name).is_file():
            content["files"][name] = seal(folder / name).model_dump()
    change(content)
    content.pop("checksum", None)
    content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(content))


def _flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 16
    path.write_bytes(content)


def _replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


class _Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._folder),)


def _arm(path: Path, zipped: bool) -> None:
    bomb = _Bomb(path.parents[3] / "ran")
    torch.save({"module": bomb, "rank": 0, "state": bomb}, path, _use_new_zipfile_serialization=zipped)
    edit_manifest(path.parent)


def _noise(path: Path) -> None:
    path.write_bytes(hashlib.sha512(b"noise").digest() * 9)
    edit_manifest(path.parent)


def _instead(folder: Path, make: Damage) -> None:
    shutil.rmtree(folder)
    make(folder)


def _from_step_6(path: Path, run: Run) -> None:
    shutil.copy(checkpoint(run.output, 6) / path.name, path)


def _from_other_rank(path: Path, believed: bool) -> None:
    digits = re.search(r"rank_(\d+)", path.name)
    assert digits is not None
    last = digits.end() - 1
    other = path.with_name(f"{path.name[:last]}{1 - int(path.name[last])}{path.name[last + 1 :]}")
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)
    if believed:
        edit_manifest(path.parent)


DAMAGE: dict[str, Damage] = {
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by one byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one byte too long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "a bit flipped at the start": lambda path: _flip(path, 0.0),
    "a bit flipped in the middle": lambda path: _flip(path, 0.5),
    "a bit flipped at the end": lambda path: _flip(path, 1.0),
    "a folder": lambda path: _replace(path, Path.mkdir),
    "a link to itself": lambda path: _replace(path, lambda gone: gone.symlink_to(gone.name)),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "code": partial(_arm, zipped=False),
    "code in a zip file": partial(_arm, zipped=True),
    "noise that the manifest confirms": _noise,
}
COMPACT_KINDS = {("pretrain", "tensors"), ("pretrain", "common"), ("pretrain", "optimizer"), ("finetune", "tensors")}
COMPACT_DAMAGE = ("cut in half", "a bit flipped in the middle", "code", "a link to itself")


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def _drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


WRONG: tuple[Any, ...] = (None, "3", -1, 10**30, math.nan, math.inf, [], {})
SECTIONS: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("progress", "step"): WRONG,
    ("progress", "tokens"): (None, "x", -1, 10**30, math.nan),
    ("progress", "seconds"): (None, "x", -1, math.nan, math.inf),
    ("progress",): (None, [], 3),
    ("files",): (None, [], {}, {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
    ("run",): (None, [], {}, "GaLore"),
    ("run", "model"): (None, math.nan),
    ("run", "ranks"): (None, 10**30),
    ("format",): (None, "4", 10**30, math.nan, {}),
}
TEXTS = {"empty": b"", "binary": bytes(range(256)), "a list": b"[1]", "a number": b"4", "deep": b"[" * 100000}


def _on_file(run_of: tuple[str, int, str], name: str, damage: Damage, folder: Path) -> Outcome:
    found = finished_run(*run_of)
    output = found.copy(folder)
    damage(checkpoint(output, 3) / name)
    return found.resume(output)


def _step_6_into_3(run_of: tuple[str, int, str], name: str, folder: Path) -> Outcome:
    found = finished_run(*run_of)
    output = found.copy(folder)
    _from_step_6(checkpoint(output, 3) / name, found)
    return found.resume(output)


def _advice(damage: Damage, folder: Path) -> Outcome:
    """The newest of two is damaged: the command that the refusal gives must lead to the right end."""
    found = finished_run("pretrain", 2, "GaLore")
    output = found.copy(folder, (3, 6))
    damage(checkpoint(output, 6))
    refused = found.resume(output)
    if refused.verdict != "refused" or "--resume global_step3 continues" not in refused.detail:
        return Outcome("cannot go on", f"{refused.verdict}: {refused.detail}")
    return found.resume(output, "global_step3")


def _manifest_text(text: bytes, path: Path) -> None:
    path.write_bytes(text)


def _file_trials() -> list[Trial]:
    trials = []
    runs = [("pretrain", stage, optimizer) for optimizer in ("GaLore", "AdamW") for stage in (0, 2, 3)]
    for run_of in (*runs, ("finetune", 2, "GaLore")):
        program, stage, optimizer = run_of
        for kind, name in FILES[optimizer, stage].items():
            where = f"{program}, {optimizer} at ZeRO {stage}, {kind} file"
            in_compact = stage == 2 and (run_of[0], kind) in COMPACT_KINDS
            for what, damage in DAMAGE.items():
                compact = in_compact and what in COMPACT_DAMAGE
                trials.append(Trial(f"{where}: {what}", partial(_on_file, run_of, name, damage), compact))
            trials.append(Trial(f"{where}: that of step 6", partial(_step_6_into_3, run_of, name), in_compact))
            if name.startswith(("rank", "zero")):
                # DeepSpeed's files of torch's AdamW do not say whose they are: there, such a forgery is not seen.
                for believed in (False,) if name.startswith("zero") and "optim" in name else (False, True):
                    swap = partial(_from_other_rank, believed=believed)
                    text = f"{where}: of the other rank{', which the manifest confirms' if believed else ''}"
                    trials.append(Trial(text, partial(_on_file, run_of, name, swap), in_compact and believed))
    return trials


def _manifest_trials() -> list[Trial]:
    run_of = ("pretrain", 2, "GaLore")
    trials = []
    for keys, values in SECTIONS.items():
        changes = [(f"{value!r:.40}", _set(*keys, value=value)) for value in values] + [("missing", _drop(*keys))]
        for number, (text, change) in enumerate(changes):
            damage = partial(_edit, change)
            name = f"manifest, {'.'.join(keys)}: {text}"
            trials.append(Trial(name, partial(_on_file, run_of, MANIFEST, damage), number == 0 and len(keys) == 1))
    for text, content in TEXTS.items():
        damage = partial(_manifest_text, content)
        trials.append(Trial(f"manifest: {text}", partial(_on_file, run_of, MANIFEST, damage)))
    for what in ("missing", "a folder", "a link to itself", "a bit flipped in the middle"):
        trials.append(Trial(f"manifest: {what}", partial(_on_file, run_of, MANIFEST, DAMAGE[what])))
    return trials


def _edit(change: Callable[[dict[str, Any]], None], path: Path) -> None:
    edit_manifest(path.parent, change)


def _advice_trials() -> list[Trial]:
    damages: dict[str, Damage] = {
        "a file is cut": lambda folder: os.truncate(folder / "common.pt", 100),
        "a bit is flipped": lambda folder: _flip(folder / FILES["GaLore", 2]["tensors"], 0.5),
        "no manifest": lambda folder: (folder / MANIFEST).unlink(),
        "an empty folder": partial(_instead, make=Path.mkdir),
        "a file instead": partial(_instead, make=Path.touch),
    }
    return [
        Trial(f"the newest of two, {what}: go on as told", partial(_advice, damage), what == "a bit is flipped")
        for what, damage in damages.items()
    ]


def trials() -> list[Trial]:
    """All trials of damaged checkpoints."""
    return [*_file_trials(), *_manifest_trials(), *_advice_trials()]
