"""Reading what DeepSpeed's own checkpoints of AdamW runs have, at ZeRO 0 to 3 and on any number of ranks.

Which element is where in which rank's file is left to DeepSpeed's ``zero_to_fp32``. It merges fp32 weights; moments are
laid out in the same way, and are merged by it in their place. The files themselves are read as data.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import constants as keys
from deepspeed.utils import zero_to_fp32

from ds_lowrank.checkpoint.incoming import Incoming, Named
from ds_lowrank.checkpoint.restricted_load import read_data
from ds_lowrank.errors import CheckpointError


def is_deepspeed(folder: Path) -> bool:
    """Whether DeepSpeed saved a checkpoint into a folder.

    Args:
        folder: any.
    """
    return any(folder.glob("*_model_states.pt"))


def read_deepspeed(folder: Path, *, moments: bool = True) -> Incoming:
    """Read a checkpoint of DeepSpeed's own.

    Args:
        folder: with the files of all ranks.
        moments: whether AdamW's moments are needed.

    Raises:
        CheckpointError: it is none, is damaged, or was saved with tensor, pipeline or expert parallelism.
    """
    check_parallelism(folder)
    try:
        models = [read_data(Path(name), mapped=True) for name in zero_to_fp32.get_model_state_files(str(folder))]
        files = sorted(folder.glob("*_optim_states.pt"))
        if any(model.get("num_experts") or model.get("ds_autoep_layers") for model in models):
            raise CheckpointError(f"{folder} has experts of DeepSpeed's MoE layers, which cannot be converted")
        if not files:
            return _replicated(folder, models[0], moments)
        names = zero_to_fp32.get_optim_files(str(folder))
        shards = [read_data(Path(name), mapped=True)[keys.OPTIMIZER_STATE_DICT] for name in names]
        return _partitioned(folder, models, shards)
    except (KeyError, TypeError, AttributeError, IndexError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{folder} does not have what DeepSpeed 0.19.8 saves: {type(error).__name__}: {error}"
        ) from error


def check_parallelism(folder: Path) -> None:
    """Refuse what is split in other ways than by ZeRO.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: it is.
    """
    if any(folder.glob("*_expert_*_states.pt")):
        raise CheckpointError(f"{folder} has experts of DeepSpeed's MoE layers, which cannot be converted")
    if any(folder.glob("layer_*states.pt")):
        raise CheckpointError(
            f"{folder} was saved by a pipeline, whose layers DeepSpeed numbers: it cannot be converted"
        )
    if not is_deepspeed(folder):
        raise CheckpointError(f"{folder} is not a checkpoint of DeepSpeed's: it has no *_model_states.pt")
    if any(path for path in folder.glob("*_model_states.pt") if "mp_rank_00_" not in path.name):
        raise CheckpointError(
            f"{folder} was saved with tensor parallelism: convert it with DeepSpeed's ds_to_universal first, and that "
            "folder with --from universal"
        )


def frozen_and_buffers(models: Sequence[Mapping[str, Any]], stage: int) -> dict[str, torch.Tensor]:
    """What no optimizer has: frozen parameters and buffers, in the dtype that they were saved in.

    Args:
        models: the model states of every rank at ZeRO 3, else of one.
        stage: the ZeRO stage.
    """
    found = {name: models[0]["module"][name] for name in models[0][keys.BUFFER_NAMES]}
    if not models[0].get(keys.FROZEN_PARAM_SHAPES):
        shapes = {name for group in models[0][keys.PARAM_SHAPES] or [] for name in group}
        left = {*models[0]["module"]} - shapes - {*found} - {*(models[0].get("shared_params") or {})}
        return found | {name: models[0]["module"][name] for name in left if stage < 3}
    states = [_model_state(model, []) for model in models]
    with contextlib.redirect_stdout(io.StringIO()):
        if stage == 3:
            zero_to_fp32._zero3_merge_frozen_params(found, len(models), states)
        else:
            zero_to_fp32._zero2_merge_frozen_params(found, states)
    return found


def _partitioned(folder: Path, models: list[dict[str, Any]], shards: list[dict[str, Any]]) -> Incoming:
    """Read what ZeRO dealt over ranks."""
    stage = int(shards[0].get(keys.ZERO_STAGE, 1))  # BF16_Optimizer names none, and deals as ZeRO 1 does
    ranks = shards[0][keys.PARTITION_COUNT]
    ranks = max(ranks) if isinstance(ranks, list) else ranks
    if ranks != len(shards) or (stage == 3 and ranks != len(models)):
        raise CheckpointError(f"{folder} is damaged: it has the files of {len(shards)} of {ranks} ranks")
    shapes = models[0][keys.PARAM_SHAPES]
    trained = [name for group in shapes for name in group]
    weights_key = keys.FP32_FLAT_GROUPS if stage == 3 else keys.SINGLE_PARTITION_OF_FP32_GROUPS
    base_key = keys.OPTIMIZER_STATE_DICT if stage == 3 else keys.BASE_OPTIMIZER_STATE
    base = [shard.get(base_key, {"state": {}}) for shard in shards]
    if not isinstance(base[0], dict):
        raise CheckpointError(
            f"{folder} was saved with zero_optimization.elastic_checkpoint, which cannot be converted"
        )

    def merged(groups: list[list[torch.Tensor]]) -> Named:
        states = [_model_state(model, shapes) for model in models]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if stage == 3:
                found = zero_to_fp32._get_fp32_state_dict_from_zero3_checkpoint(len(shards), groups, states, True)
            else:
                paddings = shards[0].get(keys.PARAM_ALIGNMENT_PADDINGS)
                found = zero_to_fp32._get_fp32_state_dict_from_zero2_checkpoint(
                    len(shards), groups, states, True, paddings
                )
        for name, tensor in found.items():
            yield name, tensor.contiguous().float()

    def weights() -> Named:
        yield from frozen_and_buffers(models, stage).items()
        yield from merged([list(shard[weights_key]) for shard in shards])

    def moments(key: str) -> Named:
        groups = []
        for shard, state in zip(shards, base, strict=True):
            # Weights are saved without the padding at the end of the last rank, moments with it.
            sizes = [flat.numel() for flat in shard[weights_key]]
            groups.append([state["state"][n][key].view(-1)[:size] for n, size in enumerate(sizes)])
        yield from merged(groups)

    steps = {}
    has_moments = all({"exp_avg", "exp_avg_sq"} <= state["state"].get(0, {}).keys() for state in base)
    if has_moments:
        step = step_of(base[0]["state"][0], base[0]["param_groups"][0])
        steps = dict.fromkeys(trained, step)
    return Incoming(int(models[0]["global_steps"]), weights, moments, steps)


def step_of(state: Mapping[str, Any], group: Mapping[str, Any]) -> int:
    """How many steps AdamW has taken: torch's keeps it in the state, apex's in the group.

    Args:
        state: of one parameter.
        group: its group.
    """
    return int(state["step"] if "step" in state else group["step"])


def _model_state(model: Mapping[str, Any], shapes: list[dict[str, Any]]) -> Any:
    return zero_to_fp32.zero_model_state(
        buffers={},
        param_shapes=shapes,
        shared_params=[],
        ds_version=None,
        frozen_param_shapes=model.get(keys.FROZEN_PARAM_SHAPES),
        frozen_param_fragments=model.get(keys.FROZEN_PARAM_FRAGMENTS),
    )


def _replicated(folder: Path, model: dict[str, Any], with_moments: bool) -> Incoming:
    """Read what every rank had whole, at ZeRO 0: the module, and an optimizer whose parameters have numbers."""
    module: dict[str, torch.Tensor] = model["module"]
    buffers, optimizer = set(model[keys.BUFFER_NAMES]), model["optimizer"] or {}
    if "fp32_groups_flat" in optimizer:
        raise CheckpointError(f"{folder} was saved by DeepSpeed's FP16_Optimizer at ZeRO 0, which cannot be converted")
    firsts = first_names(module)
    names = [name for name in firsts if name not in buffers]
    masters = [tensor for group in optimizer.get("fp32_groups", []) for tensor in group]
    inner = optimizer.get("optimizer_state_dict", optimizer)
    states = _named_states(names, module, inner)
    if states is None and (masters or with_moments):
        raise CheckpointError(
            f"{folder} was saved at ZeRO 0, where DeepSpeed numbers what an optimizer has, and with several parameter "
            "groups or frozen parameters nothing says which number is which parameter: save it at ZeRO 1"
            + ("" if masters else ", or give --weights-only")
        )

    def weights() -> Named:
        yield from ((name, module[name]) for name in firsts if name in buffers)
        yield from zip(names, masters or (module[name] for name in names), strict=True)

    def moments(key: str) -> Named:
        yield from ((name, state[key].float()) for name, state in (states or {}).items() if key in state)

    found = {name: state for name, state in (states or {}).items() if {"exp_avg", "exp_avg_sq"} <= state.keys()}
    steps = {name: step_of(state, inner["param_groups"][0]) for name, state in found.items()}
    return Incoming(int(model["global_steps"]), weights, moments, steps)


def first_names(module: Mapping[str, torch.Tensor]) -> list[str]:
    """The names in a module's state, of tied weights only the first: they share their storage, also in a file.

    Args:
        module: tensors by name.
    """
    seen: set[Any] = set()
    found = []
    for name, tensor in module.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        if not tensor.numel() or place not in seen:
            found.append(name)
        seen.add(place)
    return found


def _named_states(
    names: Sequence[str], module: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any]
) -> dict[str, dict[str, Any]] | None:
    """The states of a torch optimizer by name; None if its numbers cannot be told."""
    groups, states = optimizer.get("param_groups", []), optimizer.get("state", {})
    numbers = [number for group in groups for number in group["params"]]
    if not states:
        return {}
    if len(groups) != 1 or len(numbers) != len(names):
        return None
    found = {name: states.get(number, {}) for name, number in zip(names, numbers, strict=True)}
    fits = all("exp_avg" not in state or state["exp_avg"].shape == module[name].shape for name, state in found.items())
    return found if fits else None
