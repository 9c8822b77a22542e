"""Where DeepSpeed put the elements of each parameter: read off its wrappers, never computed anew.

=======================  =================================================================================
wrapper                  what it did to the optimizer's parameters
=======================  =================================================================================
none (fp32, stage 0)     nothing
FP16_UnfusedOptimizer    replaced each group's trainable parameters by fp32 clones, in order
DeepSpeedZeroOptimizer,  one flat fp32 partition a group: this rank's share of the flat buffer of which the model's
BF16_Optimizer           parameters are views
Stage 3                  one flat fp32 partition a sub-group; ``param._z3_optimizer.grad_position`` says where
=======================  =================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_lowrank.errors import ConfigError
from ds_lowrank.sharding.layout import Range, Spans
from ds_lowrank.sharding.logical import Logical

NO_OFFLOAD = "optimizer offload is not supported: remove zero_optimization.offload_optimizer"


@dataclass
class Interval:
    """This rank's elements ``[start, end)`` of one parameter, ``offset`` elements into ``store``.

    ``store`` is what DeepSpeed updates in one ``step()``: the parameter itself, its fp32 clone, or a flat partition. A
    rank that holds nothing of the parameter still knows the store that the others update with it.
    """

    store: torch.Tensor
    start: int
    end: int
    offset: int

    def fragment(self, logical: Logical) -> Fragment:
        """Those of them that are of one logical matrix."""
        spans = logical.spans(self.start, self.end)
        return Fragment(self.store, tuple((self.offset + lo, self.offset + hi) for lo, hi in spans))


@dataclass
class Fragment:
    """The elements of one logical matrix that lie in a store: one span of it, or of a fused weight several."""

    store: torch.Tensor
    spans: Spans

    @property
    def weights(self) -> torch.Tensor:
        """The elements, flat: a view of the store where they are one span, else a copy, to be put back."""
        return self._of(self.store.data.view(-1))

    @property
    def gradient(self) -> torch.Tensor:
        """Their gradient, flat. Only while the store has one."""
        gradient = self.store.grad
        assert gradient is not None
        return self._of(gradient.reshape(-1))

    def _of(self, flat: torch.Tensor) -> torch.Tensor:
        if len(self.spans) == 1:
            return flat[slice(*self.spans[0])]
        return torch.cat([flat[:0], *(flat[lo:hi] for lo, hi in self.spans)])

    def put(self, weights: torch.Tensor) -> None:
        """Write what was done to :attr:`weights` into the store."""
        if len(self.spans) == 1:
            return
        flat = self.store.data.view(-1)
        for (lo, hi), piece in zip(self.spans, torch.split(weights, [b - a for a, b in self.spans]), strict=True):
            flat[lo:hi] = piece


@dataclass
class Placement:
    """Where all parameters of an optimizer lie.

    Attributes:
        wrapper: for the log.
        intervals: one a parameter, group by group, in the order given.
        process_group: the ranks over which they are split; None where every rank holds them whole.
    """

    wrapper: str
    intervals: list[list[Interval]]
    process_group: dist.ProcessGroup | None


def unpartitioned_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of the parameter as its layer has it, also where ZeRO 3 has emptied it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def read_placement(parameters: Sequence[Sequence[torch.nn.Parameter]], groups: Sequence[dict[str, Any]]) -> Placement:
    """Find every parameter's elements.

    Args:
        parameters: the trainable parameters each group was built with.
        groups: the optimizer's param groups as they are now, in the same order.

    Raises:
        RuntimeError: a wrapper that this package does not know rearranged the groups.
        ConfigError: the optimizer's states are offloaded, or a parameter is not contiguous.
    """
    # Decided by what the groups hold now: a parameter may still carry marks of an engine that is gone.
    both = list(zip(parameters, groups, strict=True))
    if all(_is_untouched(own, group) for own, group in both):
        return Placement("none", [[_whole_parameter(p, p) for p in own] for own in parameters], None)
    if all(_are_clones(own, group) for own, group in both):
        pairs = [zip(own, group["params"], strict=True) for own, group in both]
        return Placement(
            "FP16_UnfusedOptimizer", [[_whole_parameter(p, clone) for p, clone in pair] for pair in pairs], None
        )
    if all(_is_stage3(own, group) for own, group in both):
        return _stage3(parameters)
    if all(hasattr(parameter, "_hp_mapping") for own in parameters for parameter in own):
        return _flat_partitions(parameters, groups)
    raise RuntimeError(
        "the optimizer's parameters were rearranged by a wrapper that ds_lowrank does not know: it cannot tell which "
        "matrix an element belongs to. Supported: no wrapper, and DeepSpeed 0.19's ZeRO 0 to 3, fp32, bf16 and fp16."
    )


def _is_untouched(own: Sequence[torch.nn.Parameter], group: dict[str, Any]) -> bool:
    return len(own) == len(group["params"]) and all(a is b for a, b in zip(own, group["params"], strict=True))


def _are_clones(own: Sequence[torch.nn.Parameter], group: dict[str, Any]) -> bool:
    clones = group["params"]
    return len(own) == len(clones) and all(a.shape == b.shape for a, b in zip(own, clones, strict=True))


def _is_stage3(own: Sequence[torch.nn.Parameter], group: dict[str, Any]) -> bool:
    """Stage 3 empties the groups, and puts one partition in while it steps a sub-group."""
    partitions = {
        id(p) for q in own if hasattr(q, "_z3_optimizer") for p in q._z3_optimizer.fp32_partitioned_groups_flat
    }
    return all(hasattr(q, "_z3_optimizer") for q in own) and all(id(p) in partitions for p in group["params"])


def _whole_parameter(parameter: torch.nn.Parameter, store: torch.Tensor) -> Interval:
    if not store.is_contiguous():
        raise ConfigError(
            f"a parameter of shape {tuple(parameter.shape)} is not contiguous in memory (a transposed view?), and its "
            "elements are updated in place in their order: make it contiguous before building the optimizer"
        )
    return Interval(store, 0, parameter.numel(), 0)


def _flat_partitions(parameters: Sequence[Sequence[torch.nn.Parameter]], groups: Sequence[dict[str, Any]]) -> Placement:
    process_group = next(parameter._dp_group for own in parameters for parameter in own)  # type: ignore[attr-defined]
    intervals = [
        [_by_storage(parameter, group["params"][0], process_group) for parameter in own]
        for own, group in zip(parameters, groups, strict=True)
    ]
    return Placement("flat fp32 partitions", intervals, process_group)


def _by_storage(parameter: torch.nn.Parameter, partition: torch.Tensor, process_group: dist.ProcessGroup) -> Interval:
    """The overlap of a parameter with this rank's partition of its group.

    The model's parameters are views of one flat buffer a group, of which every rank updates an equal share: a
    parameter's storage offset is its place in it. DeepSpeed's own ``_hp_mapping`` says the same, except under
    ``round_robin_gradients``, where 0.19.8 forgets the changed order.
    """
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None and mapping.use_offload:
        raise ConfigError(NO_OFFLOAD)
    size, world = partition.numel(), dist.get_world_size(process_group)
    buffer = parameter.untyped_storage().nbytes() // parameter.element_size()
    if parameter.numel() and buffer != size * world:
        raise RuntimeError(
            f"a parameter lies in a buffer of {buffer} elements, {world} partitions of {size} were expected: this "
            "version of DeepSpeed lays ZeRO 1 and 2 out otherwise; use deepspeed 0.19.8"
        )
    low = dist.get_rank(process_group) * size
    offset = int(parameter.storage_offset())
    start, end = max(low, offset), min(low + size, offset + parameter.numel())
    if start >= end:
        return Interval(partition, 0, 0, 0)
    return Interval(partition, start - offset, end - offset, start - low)


def _stage3(parameters: Sequence[Sequence[torch.nn.Parameter]]) -> Placement:
    intervals, process_group = [], None
    for own in parameters:
        found = []
        for parameter in own:
            tensor: Any = parameter
            zero = tensor._z3_optimizer
            if zero.offload_optimizer:
                raise ConfigError(NO_OFFLOAD)
            sub_group, offset, _ = zero.grad_position[zero.get_param_id(tensor)]
            process_group = tensor.ds_process_group
            found.append(Interval(zero.fp32_partitioned_groups_flat[sub_group], *_own_share(tensor), offset))
        intervals.append(found)
    return Placement("ZeRO stage 3 partitions", intervals, process_group)


def _own_share(tensor: Any) -> Range:
    """Of a parameter that stage 3 has cut evenly, the elements on this rank."""
    size = tensor.partition_numel()
    start = min(size * dist.get_rank(tensor.ds_process_group), tensor.ds_numel)
    return start, min(start + size, tensor.ds_numel)


def forward_weights(parameter: torch.nn.Parameter) -> tuple[Interval, bool]:
    """What a forward pass on this rank computes with, and whether it is this rank's partition only.

    At stage 3 a forward pass gathers the partitions. It does not see a change of a partition whose parameter is
    gathered already: :func:`release_gathered` comes first.
    """
    tensor: Any = parameter
    if getattr(tensor, "ds_tensor", None) is None:
        return Interval(parameter, 0, parameter.numel(), 0), False
    return Interval(tensor.ds_tensor, *_own_share(tensor), 0), True


def release_gathered(parameters: Iterable[torch.nn.Parameter]) -> None:
    """At stage 3, let go of every parameter of the model that is gathered; the next forward pass gathers it again."""
    wrappers = {id(p._z3_optimizer): p._z3_optimizer for p in parameters if hasattr(p, "_z3_optimizer")}
    for wrapper in wrappers.values():
        wrapper.parameter_offload.partition_all_parameters()


def read_intervals(
    intervals: Sequence[Interval], tensor_rank: int, process_group: dist.ProcessGroup | None
) -> tuple[list[int], list[list[Range]]]:
    """What every rank of the group holds of each parameter, by one all-gather.

    Returns:
        Every rank's tensor-parallel rank, and for every rank the ``[start, end)`` of each parameter.

    Raises:
        ConfigError: on all ranks, where they would step a parameter in different calls of ``step``.
    """
    numbers = {store: number for number, store in enumerate(dict.fromkeys(id(i.store) for i in intervals))}
    own = [(tensor_rank, 0, 0), *((i.start, i.end, numbers[id(i.store)]) for i in intervals)]
    if process_group is None or not intervals:
        return [tensor_rank], [[(start, end) for start, end, _ in own[1:]]]
    mine = torch.tensor(own, dtype=torch.int64, device=intervals[0].store.device)
    world = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(world, mine, group=process_group)
    if any(not torch.equal(rows[1:, 2], mine[1:, 2]) for rows in world):
        raise ConfigError(
            "ZeRO 3 cuts the parameters into other sub-groups on tensor-parallel ranks whose shards differ in size: "
            "leave zero_optimization.sub_group_size at its default, or choose a degree that divides all widths"
        )
    found = [[(start, end) for start, end, _ in rows.tolist()] for rows in world]
    return [rows[0][0] for rows in found], [rows[1:] for rows in found]
