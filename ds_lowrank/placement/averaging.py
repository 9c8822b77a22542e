"""Refuses groups of ranks with which DeepSpeed would not average gradients over all copies of the weights.

The ranks are data x tensor x pipeline, and DeepSpeed averages gradients over the data axis, which includes sequence
groups. Where the three do not make up the world, there is an axis that DeepSpeed or the caller knows and this package
does not, and the copies of the weights along it would drift apart.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist

from ds_lowrank.errors import ConfigError
from ds_lowrank.placement.grid import Grid, grid_of, ranks_of, sequence_size

AVERAGED = ("get_sequence_data_parallel_group", "get_data_parallel_group")
"""Methods of an ``mpu`` that return the group over which gradients are averaged, in the order in which they count."""
SEQUENCE_MESH = (
    "{} makes a device mesh with a sequence dimension, and DeepSpeed 0.19.8 averages gradients over its data dimension "
    "only, so that copies of the weights drift apart: remove it, and pass "
    "mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp after its initialize_sequence_parallel"
)


def check_unit(mpu: Any) -> None:
    """Refuse a model-parallel unit whose axes are not those of the grid.

    Args:
        mpu: the caller's, or a pipeline's.

    Raises:
        ConfigError: it has context parallelism, combines sequence groups with other axes, or its groups do not exist
            yet, overlap or leave out ranks.
    """
    try:
        grid = grid_of(mpu)
        context = getattr(mpu, "get_context_parallel_world_size", lambda: 1)()
    except AssertionError as error:
        raise ConfigError(
            f"the groups of the mpu do not exist yet ({error}): call its function that makes them, such as "
            "initialize_model_parallel or initialize_sequence_parallel, before ds_lowrank.initialize"
        ) from error
    if context > 1:
        raise ConfigError(
            "context parallelism is not supported: DeepSpeed would average gradients without its ranks. Set "
            "context_parallel_size to 1"
        )
    if sequence_size(mpu) > 1 and not grid.is_flat:
        raise ConfigError(
            "the mpu has sequence groups (Ulysses), and tensor or pipeline parallelism too, which was never tested: "
            "use one of them"
        )
    getter = next((getattr(mpu, name) for name in AVERAGED if hasattr(mpu, name)), None)
    if getter is None:
        raise ConfigError(f"the mpu has none of {', '.join(AVERAGED)}: DeepSpeed averages gradients over that group")
    _check_axes(_ranks(getter()), grid)


def check_mesh(mesh_param: Any) -> None:
    """Refuse a device mesh with a sequence dimension.

    Args:
        mesh_param: the caller's ``(data, sequence)``, or None.

    Raises:
        ConfigError: the second number is above 1.
    """
    if mesh_param and len(mesh_param) > 1 and mesh_param[1] > 1:
        raise ConfigError(SEQUENCE_MESH.format("mesh_param"))


def check_leftovers() -> None:
    """Refuse to build an engine without ``mpu`` where DeepSpeed would use the groups of an earlier engine.

    Raises:
        ConfigError: they leave out ranks, or DeepSpeed would sum gradients over sequence groups.
    """
    groups = _groups_in_use()
    if groups is None:
        return
    try:
        averaged = _ranks(groups._get_sequence_data_parallel_group())
        is_right = len(averaged) == dist.get_world_size() and groups._get_sequence_parallel_world_size() == 1
    except AssertionError:  # how every unit says that its groups are gone
        is_right = False
    if not is_right:
        raise ConfigError(
            "the process groups of an earlier engine are still set in deepspeed.utils.groups, and DeepSpeed would "
            "average the gradients of this engine, which has no mpu, over them: build it in a process of its own"
        )


def check_averaging(grid: Grid, zero: dist.ProcessGroup | None) -> None:
    """Refuse an engine that does not average gradients over all copies of the weights, however it was built.

    Args:
        grid: the optimizer's.
        zero: the ranks over which ZeRO splits the parameters; None if every rank has them whole.

    Raises:
        ConfigError: its groups overlap or leave out ranks.
    """
    groups = _groups_in_use()
    if groups is not None and groups.mesh_device is not None and not hasattr(groups.mpu, AVERAGED[0]):
        sequence = groups.mesh_device.get_group(mesh_dim="sequence_parallel")
        if dist.get_world_size(sequence) > 1:
            raise ConfigError(SEQUENCE_MESH.format("the engine's mesh_param (or its data_parallel_size)"))
    if zero is None and groups is None:
        return
    try:
        averaged = groups._get_sequence_data_parallel_group() if zero is None else zero
        engine = Grid() if groups is None else grid_of(groups.mpu)
    except AssertionError:  # its groups are gone, so that engine was not this optimizer's
        return
    _check_axes(_ranks(averaged), Grid(grid.tensor or engine.tensor, grid.pipeline or engine.pipeline))


def _groups_in_use() -> Any:
    """DeepSpeed's module of groups if an engine has set any there; does not import it."""
    groups = sys.modules.get("deepspeed.utils.groups")
    is_used = groups is not None and (groups.mpu is not None or groups.mesh_device is not None)
    return groups if is_used else None


def _check_axes(averaged: set[int], grid: Grid) -> None:
    """Refuse axes that share ranks other than this one, or that do not make up the world."""
    axes = {"data-parallel": averaged, "tensor-parallel": _own(grid.tensor), "pipeline": _own(grid.pipeline)}
    pairs = [(a, b) for a in axes for b in axes if a < b and len(axes[a] & axes[b]) > 1]
    if pairs:
        a, b = pairs[0]
        raise ConfigError(
            f"ranks {sorted(axes[a] & axes[b])} are in one {a} group and in one {b} group, but hold either the same "
            "weights or different ones: pass ds_lowrank.initialize or deepspeed.initialize an mpu that says which"
        )
    sizes = {name: len(ranks) for name, ranks in axes.items()}
    if sizes["data-parallel"] * sizes["tensor-parallel"] * sizes["pipeline"] != dist.get_world_size():
        counts = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"the groups of the engine do not make up its {dist.get_world_size()} ranks ({counts}): on an axis that is "
            "not known here, copies of the weights would drift apart. Use an mpu whose get_data_parallel_group (or "
            "get_sequence_data_parallel_group) has all ranks that hold the same weights"
        )


def _own(group: dist.ProcessGroup | None) -> set[int]:
    """The ranks of an axis; this rank alone where there is no such axis."""
    return {dist.get_rank()} if group is None else _ranks(group)


def _ranks(group: dist.ProcessGroup | None) -> set[int]:
    """The ranks of a group that averages; torch takes None for the world."""
    return set(range(dist.get_world_size())) if group is None else set(ranks_of(group))
