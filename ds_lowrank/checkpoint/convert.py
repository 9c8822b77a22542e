"""From one format of checkpoints to another, in one process without an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_lowrank.checkpoint.common import COMMON
from ds_lowrank.checkpoint.from_deepspeed import is_deepspeed, read_deepspeed
from ds_lowrank.checkpoint.from_universal import is_universal, read_universal
from ds_lowrank.checkpoint.incoming import to_ours
from ds_lowrank.checkpoint.manifest import FILE, check_files, read_manifest
from ds_lowrank.checkpoint.outgoing import check_free
from ds_lowrank.checkpoint.saved import find, opened
from ds_lowrank.checkpoint.skeleton import Skeleton, build, read_config
from ds_lowrank.checkpoint.to_deepspeed import to_deepspeed
from ds_lowrank.checkpoint.to_huggingface import to_huggingface
from ds_lowrank.checkpoint.to_universal import to_universal
from ds_lowrank.errors import CheckpointError, ConfigError

LATEST = ("latest_universal", "latest")


@dataclass(frozen=True)
class Wanted:
    """How a checkpoint is converted.

    Attributes:
        to: ``universal``, ``deepspeed``, ``huggingface`` or ``ours``.
        source: ``ours``, ``deepspeed`` or ``universal``; None to see from the files.
        weights_only: with ``ours``, whether AdamW's moments are left out.
        config: a Hugging Face folder or config.json of the model; None for that of the run, if it says so.
        tokenizer: with ``huggingface``, a folder or name of a tokenizer to save too.
        dtype: with ``huggingface``, of the weights: float32 by default.
        max_shard_size: with ``huggingface``, of each file: 5GB by default.
    """

    to: str
    source: str | None = None
    weights_only: bool = False
    config: Path | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    max_shard_size: str | None = None

    def check(self, source: str) -> None:
        """Check that nothing is asked for that would be ignored.

        Args:
            source: the format of the checkpoint.

        Raises:
            ConfigError: it is.
        """
        if (source == "ours") == (self.to == "ours"):
            there = "one of ours" if source == "ours" else "one of DeepSpeed's"
            raise ConfigError(f"--to {self.to}: the checkpoint is {there}; one side must be ours")
        if self.to != "huggingface":
            for key in ("tokenizer", "dtype", "max_shard_size"):
                if getattr(self, key) is not None:
                    raise ConfigError(f"--{key.replace('_', '-')} is for --to huggingface")
        if self.weights_only and self.to != "ours":
            raise ConfigError("--weights-only is for --to ours: the other formats get no moments anyway")


def convert(path: Path, out: Path, wanted: Wanted) -> str:
    """Convert a checkpoint.

    Args:
        path: its folder, or the one above it that names the latest.
        out: the folder to make.
        wanted: how.

    Returns:
        A line about what was written.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model, or ``out`` is there.
        ConfigError: the model is not known, or something is asked for that does not fit.
        OSError: something cannot be read or written.
    """
    folder, source = source_of(path, wanted.source)
    wanted.check(source)
    check_free(out)
    if source != "ours":
        skeleton = None if wanted.config is None else Skeleton(build(read_config(wanted.config)))
        moments = not wanted.weights_only
        if (folder / FILE).is_file():  # a run of launch/* with AdamW
            check_files(folder, read_manifest(folder))
        found = read_universal(folder) if source == "universal" else read_deepspeed(folder, moments=moments)
        to_ours(found, folder, skeleton, out, moments=moments)
        kept = f" and AdamW's moments of {len(found.steps)} parameters" if moments and found.steps else ""
        return f"wrote {out}: the weights{kept} of {folder}"
    with opened(folder) as saved:
        config = read_config(wanted.config) if wanted.config is not None else saved.manifest.run.get("model")
        if wanted.to == "huggingface":
            _export(saved, config, out, wanted)
        else:
            skeleton = None if config is None else Skeleton(build(config))
            (to_universal if wanted.to == "universal" else to_deepspeed)(saved, skeleton, out)
    return f"wrote {out}: the weights of {folder}"


def _export(saved: Any, config: Any, out: Path, wanted: Wanted) -> None:
    if config is None:
        raise ConfigError(
            f"{saved.folder} does not say which model it is of: give its config.json, or a Hugging Face folder, by "
            "--config"
        )
    dtype: torch.dtype = getattr(torch, wanted.dtype or "float32")
    shard = wanted.max_shard_size or "5GB"
    to_huggingface(saved, build(config), out, dtype=dtype, tokenizer=wanted.tokenizer, shard=shard)


def source_of(path: Path, source: str | None) -> tuple[Path, str]:
    """The folder of a checkpoint, and its format.

    Args:
        path: what the command line says.
        source: the format that it says; None for none.

    Raises:
        CheckpointError: there is none, or it has another format.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if source == "ours":
        return find(path), source
    tests = {"universal": is_universal, "deepspeed": is_deepspeed}
    named = [path / (path / name).read_text(errors="replace").strip() for name in LATEST if (path / name).is_file()]
    for folder in (path, *named):
        if (folder / COMMON).is_file():
            if source is None:
                return folder, "ours"
            continue
        for name, test in tests.items():
            if source in (None, name) and folder.is_dir() and test(folder):
                return folder, name
    if source is None:
        return find(path), "ours"
    raise CheckpointError(f"{path} has no {source} checkpoint: is --from right?")
