"""The grid of ranks: which process groups split a layer, and which hold the stages of one pipeline.

DeepSpeed and megatron-core both arrange the ranks as (pipeline, data, tensor), with tensor-parallel ranks next to each
other. Data parallelism is read from ZeRO; the other two axes are read here. The ranks of a sequence group (DeepSpeed's
Ulysses) hold whole weights, and ZeRO treats them like data-parallel ranks, so they are no axis of the grid.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_lowrank.placement.marks import is_split

TENSOR = ("get_tensor_model_parallel_group", "get_slice_parallel_group")
"""Methods of an ``mpu`` that return the tensor-parallel group, in the order in which they are tried."""
MODEL = ("get_model_parallel_group",)
"""An older name for the tensor-parallel group, which newer units give to other groups too."""
PIPELINE = ("get_pipeline_model_parallel_group", "get_pipe_parallel_group")
"""Methods of an ``mpu`` that return the pipeline group, in the order in which they are tried."""
SEQUENCE = ("get_sequence_parallel_group",)
"""Methods of an ``mpu`` that return the group over which each sequence is split (Ulysses)."""


@dataclass(frozen=True)
class Grid:
    """This rank's process groups for tensor and pipeline parallelism.

    Attributes:
        tensor: the ranks over which layers are split; None for one rank.
        pipeline: the ranks that hold the stages of one pipeline; None for one stage.
    """

    tensor: dist.ProcessGroup | None = None
    pipeline: dist.ProcessGroup | None = None

    @property
    def tensor_rank(self) -> int:
        """This rank's index among the tensor-parallel ranks."""
        return 0 if self.tensor is None else dist.get_rank(self.tensor)

    @property
    def tensor_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return 1 if self.tensor is None else dist.get_world_size(self.tensor)

    @property
    def pipeline_rank(self) -> int:
        """This rank's stage of the pipeline."""
        return 0 if self.pipeline is None else dist.get_rank(self.pipeline)

    @property
    def pipeline_size(self) -> int:
        """Number of pipeline stages."""
        return 1 if self.pipeline is None else dist.get_world_size(self.pipeline)

    @property
    def is_flat(self) -> bool:
        """Whether there is data parallelism only."""
        return self.tensor is None and self.pipeline is None


def grid_of(mpu: Any) -> Grid:
    """Read the grid that a model-parallel unit describes.

    Args:
        mpu: megatron-core's ``parallel_state``, DeepSpeed's pipeline grid or ``parallel_state_sp``, or any object with
            their getters. None for data parallelism only.
    """
    if mpu is None:
        return Grid()
    pipeline = _group(mpu, PIPELINE)
    if any(hasattr(mpu, name) for name in TENSOR):
        return Grid(_group(mpu, TENSOR), pipeline)
    # Megatron's first units had no other axis. DeepSpeed's parallel_state_sp returns its sequence group here.
    named = _group(mpu, MODEL)
    others = [group for group in (pipeline, _sequence_group(mpu)) if group is not None]
    is_other = named is not None and any(ranks_of(named) == ranks_of(other) for other in others)
    return Grid(None if is_other else named, pipeline)


def sequence_size(mpu: Any) -> int:
    """The number of ranks over which each sequence is split by Ulysses; 1 without.

    Args:
        mpu: the model-parallel unit, or None.
    """
    group = None if mpu is None else _sequence_group(mpu)
    return 1 if group is None else dist.get_world_size(group)


def initialized_grid(parameters: Iterable[torch.Tensor]) -> Grid:
    """The grid of parameters whose engine nobody has named: the tensor-parallel group that exists in this process.

    Groups stay behind when their engine is gone. They are the grid only of parameters that are marked as split.

    Args:
        parameters: those that are trained.
    """
    return Grid(initialized_tensor_group()) if any(is_split(parameter) for parameter in parameters) else Grid()


def initialized_tensor_group() -> dist.ProcessGroup | None:
    """The tensor-parallel group that exists in this process, whoever made it; None without."""
    tensors = (grid_of(mpu).tensor for mpu in _initialized())
    return next((tensor for tensor in tensors if tensor is not None), None)


def ranks_of(group: dist.ProcessGroup) -> list[int]:
    """The global ranks of a process group, in its order.

    Args:
        group: this rank is in it.
    """
    ranks: list[int] = dist.get_process_group_ranks(group)
    return ranks


def joined(*groups: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The union of process groups that overlap on this rank.

    If more than one of the groups has several ranks, this is a collective over the world, because new process groups
    may have to be made.

    Args:
        *groups: groups that this rank is in; None for this rank alone.

    Returns:
        A group of all ranks that are connected to this one by these groups of any rank; None for this rank alone.
    """
    given = [group for group in groups if group is not None and dist.get_world_size(group) > 1]
    if len(given) < 2:
        return given[0] if given else None
    return _made([ranks_of(group) for group in given])


def for_cpu_tensors(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A group of the same ranks whose collectives take tensors on the CPU, which NCCL's do not.

    A collective over the world where the group has no such backend: a group of gloo's is made then.

    Args:
        group: this rank is in it, and has it for the same reason as every other rank of the world has one; None for
            this rank alone.
    """
    if group is None or "cpu:" in dist.get_backend_config(group):
        return group
    return _made([ranks_of(group)], "gloo")


def _made(own: list[list[int]], backend: str | None = None) -> dist.ProcessGroup | None:
    """The union of lists of ranks that overlap, also on other ranks, as a group. Collective over the world.

    Args:
        own: this rank is in each.
        backend: of the group; None for the world's.
    """
    of_all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all_ranks, own)
    found: dist.ProcessGroup | None = None
    for ranks in _components([set(ranks) for lists in of_all_ranks for ranks in lists]):
        group = _group_of(ranks, backend)  # also for ranks that are not in it: making one is collective
        if dist.get_rank() in ranks:
            found = group
    return found


def _initialized() -> list[Any]:
    """What may have made tensor-parallel groups in this process; imports neither DeepSpeed nor megatron-core."""
    found = []
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None and groups.mpu is not None:  # the unit of the engine that was built last
        found.append(groups.mpu)
    if groups is not None and groups._TENSOR_MODEL_PARALLEL_GROUP is not None:
        found.append(groups)
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None and state.model_parallel_is_initialized():
        found.append(state)
    return found


def _group(mpu: Any, getters: Sequence[str]) -> dist.ProcessGroup | None:
    """The group that the first getter found on ``mpu`` returns; None for a group of one rank."""
    getter: Callable[[], Any] | None = next((getattr(mpu, name) for name in getters if hasattr(mpu, name)), None)
    group = None if getter is None else getter()
    return group if group is not None and dist.get_world_size(group) > 1 else None


def _sequence_group(mpu: Any) -> dist.ProcessGroup | None:
    """The group over which each sequence is split; None without, or if the unit was made without such groups."""
    try:
        return _group(mpu, SEQUENCE)
    except AssertionError:
        return None


# The process groups made here, by their ranks and backend, and the world they belong to. A module global, because
# nothing destroys the groups of an engine that is gone: otherwise a process that builds one engine after another would
# make the same group again each time. When the world is replaced, its groups are forgotten.
_groups_made: tuple[Any, dict[tuple[tuple[int, ...], str | None], Any]] = (None, {})


def _group_of(ranks: list[int], backend: str | None) -> Any:
    """The process group of some ranks, made once per world."""
    global _groups_made
    if _groups_made[0] is not dist.group.WORLD:
        _groups_made = dist.group.WORLD, {}
    groups = _groups_made[1]
    key = tuple(ranks), backend
    if key not in groups:
        groups[key] = dist.new_group(ranks, backend=backend)
    return groups[key]


def _components(sets: Sequence[set[int]]) -> list[list[int]]:
    """Merge sets that overlap, directly or through others; each result is sorted, and so is the list."""
    merged: list[set[int]] = []
    for new in sets:
        disjoint = [other for other in merged if not other & new]
        merged = [*disjoint, new.union(*(other for other in merged if other & new))]
    return sorted(sorted(component) for component in merged)
