"""manifest.json: which files a checkpoint consists of, their checksums, and which run it belongs to.

It is written last, so that only a complete checkpoint has one, and has a checksum of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ds_lowrank.checkpoint.disk import flush, sha256
from ds_lowrank.errors import CheckpointError

FILE = "manifest.json"
FORMAT = 5


class DamagedError(CheckpointError):
    """A checkpoint is incomplete, or its files are not those that were saved."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps taken.
        tokens: tokens trained on, on all ranks together.
        seconds: time spent on training steps.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Identity:
    """Settings that must be equal in the run that saved a checkpoint and the run that loads it.

    Attributes:
        model: the model's configuration, with everything else that determines its parameters.
        optimizer: ``optimizer.type`` of the DeepSpeed configuration.
        optimizer_params: the optimizer's options, including those from the command line.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        zero_stage: ZeRO stage, 0 to 3.
        ranks: the number of ranks in the job.
        tensor_parallel: degree of megatron-core's tensor parallelism.
        autotp_size: degree of DeepSpeed's own tensor parallelism.
        pipeline_parallel: the number of pipeline stages.
        sequence_length: the most tokens of a sequence.
        train_batch_size: sequences per optimizer step on all ranks together.
        micro_batch_size: sequences per forward pass on one rank.
        seed: the run's seed.
    """

    model: dict[str, Any]
    optimizer: str
    optimizer_params: dict[str, Any]
    precision: str
    zero_stage: int
    ranks: int
    tensor_parallel: int
    autotp_size: int
    pipeline_parallel: int
    sequence_length: int
    train_batch_size: int
    micro_batch_size: int
    seed: int


GRID = frozenset({"zero_stage", "ranks", "tensor_parallel", "autotp_size", "pipeline_parallel", "micro_batch_size"})
"""The settings that say on which ranks a run trains. With the same ones, every rank draws the same random numbers."""
REMEDIES = {
    "model": "give the --model, --task and LoRA flags it was trained with",
    "optimizer": "name the same optimizer.type in the DeepSpeed configuration",
    "optimizer_params": "use the same optimizer.params, --lr, --matrix-lr-scale and --schedule",
    "precision": "use the same bf16 and fp16 blocks in the DeepSpeed configuration",
    "zero_stage": "use the same zero_optimization.stage",
    "ranks": "start as many ranks",
    "tensor_parallel": "give the same --tensor-parallel",
    "autotp_size": "use the same tensor_parallel.autotp_size",
    "pipeline_parallel": "give the same --pipeline-parallel",
    "sequence_length": "give the same --sequence-length or --max-length",
    "train_batch_size": "give the same --global-batch-size",
    "micro_batch_size": "give the same --micro-batch-size",
    "seed": "give the same --seed",
}


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError("is not the name of a file in the checkpoint")
    return name


class Sealed(BaseModel):
    """A file of a checkpoint, as it was when it was saved.

    Attributes:
        bytes: its size.
        sha256: the SHA-256 of its bytes, in hexadecimal.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Progress(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    seconds: float = Field(ge=0, allow_inf_nan=False)


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    progress: _Progress
    run: dict[str, Any]
    files: dict[Annotated[str, AfterValidator(_inside)], Sealed]
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest.json says.

    Attributes:
        progress: how far the run was.
        run: the run's identity, as JSON has it.
        files: the files of the checkpoint, by their names in its folder.
    """

    progress: Progress
    run: dict[str, Any]
    files: dict[str, Sealed]


def seal(path: Path) -> Sealed:
    """Flush a file to the disk, and compute what the manifest says about it.

    Raises:
        OSError: it cannot be written or read.
    """
    flush(path)
    return Sealed(bytes=path.stat().st_size, sha256=sha256(path))


def write_manifest(directory: Path, run: Mapping[str, Any], progress: Progress, files: Mapping[str, Sealed]) -> None:
    """Write manifest.json and flush it to the disk.

    Args:
        directory: the folder of the checkpoint, complete except for the manifest.
        run: identifies the run; empty for an engine that is driven by another program.
        progress: how far the run is.
        files: the files in ``directory``, by name.
    """
    content = {
        "format": FORMAT,
        "progress": asdict(progress),
        "run": dict(run),
        "files": {name: sealed.model_dump() for name, sealed in sorted(files.items())},
    }
    content["checksum"] = _checksum(content)
    (directory / FILE).write_text(json.dumps(content, indent=2) + "\n")
    flush(directory / FILE)


def read_manifest(directory: Path) -> Manifest:
    """Read manifest.json and check it against its own checksum.

    Raises:
        DamagedError: there is none, or it is not what was saved.
        CheckpointError: another version of the package wrote it.
    """
    path = directory / FILE
    if not path.is_file():
        raise DamagedError(f"{directory} is not a complete checkpoint: it has no {FILE}")
    try:
        content = json.loads(path.read_text())
        format_number = content["format"]
        readable = type(format_number) is int
    except (ValueError, KeyError, TypeError, RecursionError):
        readable = False
    if not readable:
        raise DamagedError(f"{directory} is damaged: {FILE} is not a manifest")
    if format_number != FORMAT:
        raise CheckpointError(
            f"{path} has format {str(format_number)[:20]}, but this version reads format {FORMAT}: use the version "
            "that saved it"
        )
    try:
        found = _Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:60]
        raise DamagedError(f"{directory} is damaged: {where} of {FILE}: {first['msg']}") from None
    if found.checksum != _checksum({key: value for key, value in content.items() if key != "checksum"}):
        raise DamagedError(f"{directory} is damaged: {FILE} is not as it was saved")
    return Manifest(Progress(**found.progress.model_dump()), found.run, found.files)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_files(directory: Path, manifest: Manifest, share: slice = slice(None)) -> None:
    """Check that the files of a checkpoint are those that were saved.

    Args:
        directory: the folder of the checkpoint.
        manifest: its manifest.
        share: which of the files to read; the sizes of all are checked.

    Raises:
        DamagedError: a file is missing, damaged or not in the manifest.
        OSError: a file cannot be read.
    """
    for name, sealed in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise DamagedError(f"{directory} is damaged: {name} is missing")
        if path.stat().st_size != sealed.bytes:
            raise DamagedError(
                f"{directory} is damaged: {name} has {path.stat().st_size} bytes instead of {sealed.bytes}"
            )
    for path in sorted(directory.glob("*")):  # DeepSpeed would load it, as it finds files by their names
        if path.suffix in (".pt", ".safetensors") and path.name not in manifest.files:
            raise DamagedError(f"{directory} is damaged: {path.name} was not saved with it; remove that file")
    for name in sorted(manifest.files)[share]:
        if sha256(directory / name) != manifest.files[name].sha256:
            raise DamagedError(f"{directory} is damaged: {name} is not as it was saved")


def check_identity(
    directory: Path,
    manifest: Manifest,
    identity: Identity,
    may_differ: Collection[str] = (),
    params_may_differ: Collection[str] = (),
) -> None:
    """Check that a checkpoint belongs to a run with this identity.

    Args:
        directory: the folder of the checkpoint.
        manifest: its manifest.
        identity: identifies this run.
        may_differ: settings that need not be equal.
        params_may_differ: options of the optimizer that need not be equal.

    Raises:
        CheckpointError: settings differ; the message lists all differences and how to remove them.
    """
    saved, wanted = comparable(manifest.run, params_may_differ), comparable(asdict(identity), params_may_differ)
    different = [
        f"{key}: the checkpoint has {_brief(saved.get(key), wanted[key])}, this run "
        f"{_brief(wanted[key], saved.get(key))} ({remedy})"
        for key, remedy in REMEDIES.items()
        if key not in may_differ and saved.get(key) != wanted[key]
    ]
    if different:
        raise CheckpointError(f"{directory} belongs to a different run; nothing was changed. " + "; ".join(different))


def comparable(run: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    """What identifies a run, as it is compared.

    Args:
        run: an identity's attributes, as they are or as a manifest has them.
        without: options of the optimizer that are left out.
    """
    found: dict[str, Any] = json.loads(json.dumps(dict(run)))  # so that a tuple equals the list that it was saved as
    params = found.get("optimizer_params")
    if isinstance(params, dict):
        found["optimizer_params"] = {key: value for key, value in params.items() if key not in without}
    return found


def _brief(value: Any, other: Any) -> str:
    """A value as text; for two mappings, only the entries that differ."""
    if not isinstance(value, dict) or not isinstance(other, dict):
        return repr(value)
    differing = sorted(key for key in value.keys() | other.keys() if value.get(key) != other.get(key))
    return ", ".join(f"{key} = {value[key]!r}" if key in value else f"no {key}" for key in differing)
