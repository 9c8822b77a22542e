"""Trials of damaged checkpoints: every kind of file, at ZeRO 0, 2 and 3, in pre-training and fine-tuning.

A run of six steps is made once, with checkpoints after steps 3 and 6. A trial copies what a kill after step 3 would
have left, damages it, and resumes. It must be refused in one line or end as the run did; nothing in a file may be run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.programs import run
from benchmarks.faults.trial import Outcome, Trial
from ds_lowrank.checkpoint.manifest import seal

RANKS = 2
MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
MANIFEST = "manifest.json"
FILES = {
    0: {"model": "mp_rank_00_model_states.pt", "rank": "rank_1.pt"},
    2: {
        "model": "mp_rank_00_model_states.pt",
        "optimizer": "zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "rank": "rank_0.pt",
    },
    3: {
        "model": "zero_pp_rank_1_mp_rank_00_model_states.pt",
        "optimizer": "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "rank": "rank_1.pt",
    },
}
"""One file of each kind, by ZeRO stage."""


@dataclass(frozen=True)
class Run:
    """A run without a fault, which the trials copy and compare with.

    Attributes:
        program: ``pretrain`` or ``finetune``.
        arguments: its command line, except for ``--output``.
        output: its output folder.
    """

    program: str
    arguments: tuple[str, ...]
    output: Path

    def copy(self, folder: Path, steps: tuple[int, ...] = (3,)) -> Path:
        """Copy what a kill after the last of ``steps`` leaves, and return the output folder of the copy."""
        output = folder / "output"
        (output / "checkpoints").mkdir(parents=True)
        for step in steps:
            shutil.copytree(self.output / "checkpoints" / f"global_step{step}", checkpoint(output, step))
        lines = (self.output / "metrics.jsonl").read_text().splitlines(keepends=True)
        (output / "metrics.jsonl").write_text("".join(lines[: max(steps)]))
        shutil.copy(self.output / ".checkpoints", output)
        if (self.output / "best").exists():
            shutil.copytree(self.output / "best", output / "best")
        return output

    def resume(self, output: Path, choice: str = "") -> Outcome:
        """Resume a copy; the run's own result is the only one that is right."""
        resume = ["--resume", *([choice] if choice else [])]
        finished = run(self.program, [*self.arguments, "--output", str(output), *resume], RANKS, output.parent)
        if (output.parent / "ran").exists():
            return Outcome("ran code")
        if not finished.succeeded:
            return finished.refusal()
        different = [
            name for name in ("metrics.jsonl", "export") if _result(output, name) != _result(self.output, name)
        ]
        return Outcome("other result", ", ".join(different)) if different else Outcome("same result")


def checkpoint(output: Path, step: int) -> Path:
    """The folder of a checkpoint."""
    return output / "checkpoints" / f"global_step{step}"


def _result(output: Path, name: str) -> Any:
    if name == "export":
        return (output / name / "model.safetensors").read_bytes()
    records = [json.loads(line) for line in (output / name).read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "memory_gib")
    return [{key: value for key, value in record.items() if not key.endswith(timed)} for record in records]


@functools.cache
def workspace() -> Path:
    """A folder with a model's configuration and data for both programs, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix="faults-")) / "work"  # the outputs of the programs are written beside it
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "text").mkdir()
    for number in range(60):
        (folder / "text" / f"{number}.txt").write_text(" ".join(str(number * step % 97) for step in range(100)))
    rows = [{"text": f"{number} is {number % 3}", "label": "abc"[number % 3]} for number in range(60)]
    for name, part in (("train", rows[:45]), ("validation", rows[45:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@functools.cache
def finished_run(program: str, stage: int) -> Run:
    """The run without a fault, made once per process.

    Args:
        program: ``pretrain`` or ``finetune``.
        stage: its ZeRO stage.
    """
    folder = workspace()
    output = folder / f"{program}{stage}"
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "GaLore", "params": {"lr": 1e-2, "rank": 8, "update_proj_gap": 2}},
        "zero_optimization": {"stage": stage},
    }
    (folder / f"{stage}.json").write_text(json.dumps(config))
    model = "model.json" if program == "pretrain" else "pretrain2/export"
    data = ["--data", str(folder / "text"), "--sequence-length", "32", "--eval-sequences", "0", "--tokenizer", "bytes"]
    if program == "finetune":
        finished_run("pretrain", 2)
        data = ["--data", str(folder / "train.jsonl"), "--validation", str(folder / "validation.jsonl")]
        data += ["--max-length", "16", "--eval-interval", "2"]
    arguments = ["--deepspeed_config", str(folder / f"{stage}.json"), "--model", str(folder / model), *data]
    arguments += ["--cache", str(folder / "cache"), "--steps", "6", "--log-interval", "1", "--save-interval", "3"]
    arguments.append("--export")
    finished = run(program, [*arguments, "--output", str(output)], RANKS, folder)
    if not finished.succeeded:
        raise RuntimeError(f"the run without a fault failed: {finished.err}")
    return Run(program, tuple(arguments), output)


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


def _from_step_6(path: Path, run: Run) -> None:
    shutil.copy(checkpoint(run.output, 6) / path.name, path)


def _from_other_rank(path: Path, believed: bool) -> None:
    number = path.name.index("rank_") + len("rank_")
    other = path.with_name(f"{path.name[:number]}{1 - int(path.name[number])}{path.name[number + 1 :]}")
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)
    if believed:
        edit_manifest(path.parent)


DAMAGE: dict[str, Callable[[Path], None]] = {
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
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
    "code": partial(_arm, zipped=False),
    "code in a zip file": partial(_arm, zipped=True),
    "noise that the manifest confirms": lambda path: (
        path.write_bytes(hashlib.sha512(b"noise").digest() * 9),
        edit_manifest(path.parent),
    )[1],
}
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


def _on_file(run_of: tuple[str, int], name: str, damage: Callable[[Path], None], folder: Path) -> Outcome:
    found = finished_run(*run_of)
    output = found.copy(folder)
    damage(checkpoint(output, 3) / name)
    return found.resume(output)


def _step_6_into_3(run_of: tuple[str, int], name: str, folder: Path) -> Outcome:
    found = finished_run(*run_of)
    output = found.copy(folder)
    _from_step_6(checkpoint(output, 3) / name, found)
    return found.resume(output)


def _advice(damage: Callable[[Path], None], folder: Path) -> Outcome:
    """The newest of two is damaged: the command that the refusal gives must lead to the right end."""
    found = finished_run("pretrain", 2)
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
    for program, stage in (("pretrain", 0), ("pretrain", 2), ("pretrain", 3), ("finetune", 2)):
        for kind, name in FILES[stage].items():
            where = f"{program}, ZeRO {stage}, {kind} file"
            in_compact = (program, stage) == ("pretrain", 2) or (kind == "rank" and program == "finetune")
            for what, damage in DAMAGE.items():
                compact = in_compact and what in COMPACT_DAMAGE
                trials.append(Trial(f"{where}: {what}", partial(_on_file, (program, stage), name, damage), compact))
            trials.append(
                Trial(f"{where}: that of step 6", partial(_step_6_into_3, (program, stage), name), in_compact)
            )
            if name.startswith(("rank", "zero")):
                for believed in (False, True):
                    swap = partial(_from_other_rank, believed=believed)
                    text = f"{where}: of the other rank{', which the manifest confirms' if believed else ''}"
                    trials.append(Trial(text, partial(_on_file, (program, stage), name, swap), in_compact and believed))
    return trials


def _manifest_trials() -> list[Trial]:
    run_of = ("pretrain", 2)
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
    damages: dict[str, Callable[[Path], None]] = {
        "a file is cut": lambda folder: os.truncate(folder / "rank_0.pt", 100),
        "a bit is flipped": lambda folder: _flip(folder / FILES[2]["optimizer"], 0.5),
        "no manifest": lambda folder: (folder / MANIFEST).unlink(),
        "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir())[1],
        "a file instead": lambda folder: (shutil.rmtree(folder), folder.write_text("x"))[0],
    }
    return [
        Trial(f"the newest of two, {what}: go on as told", partial(_advice, damage), what == "a bit is flipped")
        for what, damage in damages.items()
    ]


def trials() -> list[Trial]:
    """All trials of damaged checkpoints."""
    return [*_file_trials(), *_manifest_trials(), *_advice_trials()]
