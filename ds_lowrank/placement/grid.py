"""The grid of ranks: who shares a layer's weights, who holds the other layers, and who shares one matrix.

DeepSpeed and megatron-core both lay a world out as (pipeline, data, tensor), tensor ranks side by side. Data
parallelism is read off ZeRO; what is asked here are the other two axes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

TENSOR = ("get_tensor_model_parallel_group", "get_slice_parallel_group", "get_model_parallel_group")
PIPELINE = ("get_pipeline_model_parallel_group", "get_pipe_parallel_group")


@dataclass(frozen=True)
class Grid:
    """The process groups beside data parallelism that this rank is in; None where an axis has one rank.

    Attributes:
        tensor: the ranks over which layers are split.
        pipeline: the ranks that hold the stages of one pipeline.
    """

    tensor: dist.ProcessGroup | None = None
    pipeline: dist.ProcessGroup | None = None

    @property
    def tensor_rank(self) -> int:
        return 0 if self.tensor is None else dist.get_rank(self.tensor)

    @property
    def tensor_size(self) -> int:
        return 1 if self.tensor is None else dist.get_world_size(self.tensor)

    @property
    def pipeline_size(self) -> int:
        return 1 if self.pipeline is None else dist.get_world_size(self.pipeline)

    @property
    def is_flat(self) -> bool:
        """Whether there is data parallelism only."""
        return self.tensor is None and self.pipeline is None


def grid_of(mpu: Any) -> Grid:
    """The grid that a model-parallel unit describes: megatron's ``parallel_state``, DeepSpeed's pipeline grid, others.

    Args:
        mpu: None for whatever is initialised in this process: DeepSpeed's AutoTP, or megatron-core.
    """
    if mpu is None:
        mpu = _initialised()
    if mpu is None:
        return Grid()
    # DeepSpeed's pipeline grid answers get_model_parallel_group with the ranks of all stages: asked for last.
    return Grid(_group(mpu, TENSOR), _group(mpu, PIPELINE))


def _initialised() -> Any:
    """Whoever made tensor-parallel groups in this process, without importing anybody."""
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None and groups._TENSOR_MODEL_PARALLEL_GROUP is not None:
        return groups
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None and state.model_parallel_is_initialized():
        return state
    return None


def _group(mpu: Any, names: Sequence[str]) -> dist.ProcessGroup | None:
    getter: Callable[[], Any] | None = next((getattr(mpu, name) for name in names if hasattr(mpu, name)), None)
    group = None if getter is None else getter()
    return group if group is not None and dist.get_world_size(group) > 1 else None


def joined(*groups: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks that can be reached from one another through groups; None where that is this rank alone.

    Collective over the world where more than one group has several ranks, as groups are made that were not before.
    """
    given = [group for group in groups if group is not None and dist.get_world_size(group) > 1]
    if len(given) < 2:
        return given[0] if given else None
    own = [dist.get_process_group_ranks(group) for group in given]
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    found: dist.ProcessGroup | None = None
    for ranks in _components([set(ranks) for lists in everybody for ranks in lists]):
        group = _group_of(ranks)
        if dist.get_rank() in ranks:
            found = group
    return found


_groups_made: tuple[Any, dict[tuple[int, ...], Any]] = (None, {})


def _group_of(ranks: list[int]) -> Any:
    """One group for the same ranks as long as the world lives: nobody destroys those of an engine that is gone."""
    global _groups_made
    if _groups_made[0] is not dist.group.WORLD:
        _groups_made = dist.group.WORLD, {}
    groups = _groups_made[1]
    if tuple(ranks) not in groups:
        groups[tuple(ranks)] = dist.new_group(ranks)
    return groups[tuple(ranks)]


def _components(sets: Sequence[set[int]]) -> list[list[int]]:
    """Sets that overlap, merged; sorted."""
    merged: list[set[int]] = []
    for one in sets:
        apart = [other for other in merged if not other & one]
        merged = [*apart, one.union(*(other for other in merged if other & one))]
    return sorted(sorted(one) for one in merged)
