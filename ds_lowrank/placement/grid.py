"""The grid of ranks: which process groups split a layer, and which hold the stages of one pipeline.

DeepSpeed and megatron-core both arrange the ranks as (pipeline, data, tensor), with tensor-parallel ranks next to each
other. Data parallelism is read from ZeRO; the other two axes are read here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

TENSOR = ("get_tensor_model_parallel_group", "get_slice_parallel_group", "get_model_parallel_group")
"""Methods of an ``mpu`` that return the tensor-parallel group, in the order in which they are tried."""
PIPELINE = ("get_pipeline_model_parallel_group", "get_pipe_parallel_group")
"""Methods of an ``mpu`` that return the pipeline group, in the order in which they are tried."""


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
        mpu: megatron-core's ``parallel_state``, DeepSpeed's pipeline grid, or any object with their getters. None for
            whatever is initialized in this process: DeepSpeed's AutoTP or megatron-core.
    """
    if mpu is None:
        mpu = _initialized()
    if mpu is None:
        return Grid()
    # DeepSpeed's pipeline grid answers get_model_parallel_group with the ranks of all stages, so it is tried last.
    return Grid(tensor=_group(mpu, TENSOR), pipeline=_group(mpu, PIPELINE))


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
    own = [dist.get_process_group_ranks(group) for group in given]
    of_all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all_ranks, own)
    found: dist.ProcessGroup | None = None
    for ranks in _components([set(ranks) for lists in of_all_ranks for ranks in lists]):
        group = _group_of(ranks)
        if dist.get_rank() in ranks:
            found = group
    return found


def _initialized() -> Any:
    """Whichever module has made tensor-parallel groups in this process; imports neither DeepSpeed nor megatron-core."""
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None and groups._TENSOR_MODEL_PARALLEL_GROUP is not None:
        return groups
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None and state.model_parallel_is_initialized():
        return state
    return None


def _group(mpu: Any, getters: Sequence[str]) -> dist.ProcessGroup | None:
    """The group that the first getter found on ``mpu`` returns; None for a group of one rank."""
    getter: Callable[[], Any] | None = next((getattr(mpu, name) for name in getters if hasattr(mpu, name)), None)
    group = None if getter is None else getter()
    return group if group is not None and dist.get_world_size(group) > 1 else None


# The process groups that joined() has made, by their ranks, and the world they belong to. A module global, because
# nothing destroys the groups of an engine that is gone: otherwise a process that builds one engine after another would
# make the same group again each time. When the world is replaced, its groups are forgotten.
_groups_made: tuple[Any, dict[tuple[int, ...], Any]] = (None, {})


def _group_of(ranks: list[int]) -> Any:
    """The process group of some ranks, made once per world."""
    global _groups_made
    if _groups_made[0] is not dist.group.WORLD:
        _groups_made = dist.group.WORLD, {}
    groups = _groups_made[1]
    if tuple(ranks) not in groups:
        groups[tuple(ranks)] = dist.new_group(ranks)
    return groups[tuple(ranks)]


def _components(sets: Sequence[set[int]]) -> list[list[int]]:
    """Merge sets that overlap, directly or through others; each result is sorted, and so is the list."""
    merged: list[set[int]] = []
    for new in sets:
        disjoint = [other for other in merged if not other & new]
        merged = [*disjoint, new.union(*(other for other in merged if other & new))]
    return sorted(sorted(component) for component in merged)
