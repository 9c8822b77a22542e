"""manifest.json: which files a checkpoint consists of, and which run it belongs to.

It is written last, so that only a complete checkpoint has one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_lowrank.errors import CheckpointError

FILE = "manifest.json"
FORMAT = 3


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


def write_manifest(directory: Path, identity: Identity, progress: Mapping[str, float]) -> None:
    """Write manifest.json: every file in ``directory`` with its size in bytes, the run's identity and its progress.

    Args:
        directory: the folder of the checkpoint, complete except for the manifest.
        identity: identifies the run.
        progress: how far the run is, for readers of the file.
    """
    files = {
        str(path.relative_to(directory)): path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()
    }
    manifest = {"format": FORMAT, "progress": dict(progress), "run": asdict(identity), "files": files}
    (directory / FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def check_manifest(directory: Path, identity: Identity) -> None:
    """Check that a checkpoint is complete and belongs to a run with this identity.

    Raises:
        CheckpointError: files are missing or damaged, or settings differ; the message lists all differences and how to
            remove them.
    """
    manifest = _read(directory)
    for name, size in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{directory} is damaged: {name} is missing; resume from another checkpoint")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{directory} is damaged: {name} has {path.stat().st_size} bytes instead of {size}; "
                "resume from another checkpoint"
            )
    # Through JSON, so that a tuple equals the list that it was saved as.
    wanted = json.loads(json.dumps(asdict(identity)))
    different = [
        f"{key}: the checkpoint has {_brief(manifest['run'].get(key), wanted[key])}, this run "
        f"{_brief(wanted[key], manifest['run'].get(key))} ({remedy})"
        for key, remedy in REMEDIES.items()
        if manifest["run"].get(key) != wanted[key]
    ]
    if different:
        raise CheckpointError(f"{directory} belongs to a different run; nothing was changed. " + "; ".join(different))


def _read(directory: Path) -> dict[str, Any]:
    path = directory / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is not a complete checkpoint: it has no {FILE}; resume from another checkpoint"
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        format_number = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged; resume from another checkpoint") from None
    if format_number != FORMAT:
        raise CheckpointError(
            f"{path} has format {format_number}, but this version reads format {FORMAT}: use the version that saved it"
        )
    return manifest


def _brief(value: Any, other: Any) -> str:
    """A value as text; for two mappings, only the entries that differ."""
    if not isinstance(value, dict) or not isinstance(other, dict):
        return repr(value)
    differing = sorted(key for key in value.keys() | other.keys() if value.get(key) != other.get(key))
    return ", ".join(f"{key} = {value[key]!r}" if key in value else f"no {key}" for key in differing)
