"""Reading universal checkpoints of AdamW runs, which DeepSpeed's ``ds_to_universal`` writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import constants as keys
from deepspeed.utils import zero_to_fp32

from ds_lowrank.checkpoint.from_deepspeed import first_names, frozen_and_buffers
from ds_lowrank.checkpoint.incoming import MOMENTS, Incoming, Named
from ds_lowrank.checkpoint.restricted_load import read_data
from ds_lowrank.errors import CheckpointError


def is_universal(folder: Path) -> bool:
    """Whether a folder is a universal checkpoint.

    Args:
        folder: any.
    """
    return (folder / "zero").is_dir()


def read_universal(folder: Path) -> Incoming:
    """Read a universal checkpoint, also of a run with tensor parallelism.

    Args:
        folder: with ``zero`` and model states.

    Raises:
        CheckpointError: it is none, is damaged, or has experts of DeepSpeed's MoE layers.
    """
    if not is_universal(folder):
        raise CheckpointError(f"{folder} is not a universal checkpoint: it has no folder zero")
    if any(folder.glob("*_expert_*_states.pt")):
        raise CheckpointError(f"{folder} has experts of DeepSpeed's MoE layers, which cannot be converted")
    try:
        models = [read_data(Path(name), mapped=True) for name in zero_to_fp32.get_model_state_files(str(folder))]
        return _read(folder, models)
    except (KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{folder} does not have what DeepSpeed 0.19.8 saves: {type(error).__name__}: {error}"
        ) from error


def _read(folder: Path, models: list[dict[str, Any]]) -> Incoming:
    zero = folder / "zero"
    shapes = _shapes(models[0])
    same = set(models[0].get("shared_params") or {})
    buffers = set(models[0][keys.BUFFER_NAMES])
    names = sorted(path.parent.name for path in zero.glob("*/fp32.pt") if path.parent.name not in same | buffers)
    if not names:
        raise CheckpointError(f"{folder} is damaged: zero has no weights")
    module = models[0]["module"] or {}
    first = set(first_names(module))  # the converter writes every name of a tied weight that is in the module
    names = [name for name in names if name in first or name not in module]
    is_3 = any(folder.glob("zero_pp_rank_*_model_states.pt"))
    others = frozen_and_buffers(models, 3 if is_3 else 2)
    with_moments = [name for name in names if all((zero / name / f"{key}.pt").is_file() for key in MOMENTS)]

    def tensor(name: str, key: str) -> torch.Tensor:
        return _tensor(zero / name / f"{key}.pt", shapes.get(name))

    def weights() -> Named:
        yield from ((name, one) for name, one in others.items() if name not in names)
        yield from ((name, tensor(name, "fp32")) for name in names)

    def moments(key: str) -> Named:
        yield from ((name, tensor(name, key)) for name in with_moments)

    common = read_data(zero / "optimizer_state.pt") if (zero / "optimizer_state.pt").is_file() else {}
    steps = {name: _step(zero / name / "step.pt", common) for name in with_moments}
    return Incoming(int(models[0]["global_steps"]), weights, moments, steps)


def _shapes(model: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters: one mapping in a list for each group, or only one mapping."""
    found = model[keys.PARAM_SHAPES] or []
    groups = [found] if isinstance(found, dict) else found
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


def _tensor(path: Path, shape: tuple[int, ...] | None) -> torch.Tensor:
    """A tensor in the shape of its parameter: what was saved at ZeRO 3 is flat."""
    found = read_data(path, mapped=True)
    if isinstance(found, dict):
        if found.get(keys.EP_IS_EXPERT_PARAM):
            raise CheckpointError(f"{path} has experts of DeepSpeed's MoE layers, which cannot be converted")
        found = found[keys.PARAM]
    tensor: torch.Tensor = found
    if tensor.ndim == 1 and shape is not None and math.prod(shape) == tensor.numel():
        tensor = tensor.view(shape)
    return tensor.float()


def _step(path: Path, common: dict[str, Any]) -> int:
    """AdamW's step of a parameter: in its folder, or at ZeRO 3 in what all of them share."""
    if path.is_file():
        return int(read_data(path))
    inner = common.get(keys.OPTIMIZER_STATE_DICT) or common.get(keys.BASE_OPTIMIZER_STATE) or common
    states = inner.get("state") or {}
    for state in states.values():
        if "step" in state:
            return int(state["step"])
    for group in inner.get("param_groups", []):
        if "step" in group:
            return int(group["step"])
    raise CheckpointError(f"{path.parent} does not say how many steps AdamW has taken: give --weights-only")
