"""Where DeepSpeed stores the elements of each parameter, read from its wrappers and not derived a second time.

=======================  =================================================================================
wrapper                  what it did to the optimizer's parameters
=======================  =================================================================================
none (fp32, stage 0)     nothing
FP16_UnfusedOptimizer    replaced each group's trainable parameters by fp32 clones, in order
DeepSpeedZeroOptimizer,  one flat fp32 partition per group: this rank's share of the flat buffer of which the
BF16_Optimizer           model's parameters are views
Stage 3                  one flat fp32 partition per sub-group; ``param._z3_optimizer.grad_position`` says where
=======================  =================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ds_lowrank.errors import ConfigError
from ds_lowrank.placement.fragment import Fragment
from ds_lowrank.sharding.layout import Range
from ds_lowrank.sharding.logical import Logical


@dataclass
class Placement:
    """Where DeepSpeed stores the parameters of an optimizer.

    Attributes:
        wrapper: name of the wrapper that stores them.
        intervals: for each group, one interval per parameter, in order.
        process_group: the ranks over which the parameters are split; None if every rank holds them whole.
        is_offloaded: whether the elements are stored and stepped on the CPU, wherever the model is.
    """

    wrapper: str
    intervals: list[list[Interval]]
    process_group: dist.ProcessGroup | None
    is_offloaded: bool = False


@dataclass
class Interval:
    """This rank's elements of one parameter, and where they are stored.

    Attributes:
        store: the tensor that DeepSpeed updates in one ``step()``: the parameter itself, its fp32 clone, or a flat
            partition. A rank without elements of the parameter still has the store that is updated with it.
        start: first element of the parameter on this rank.
        end: one past the last element.
        offset: where the elements begin in the flat store.
    """

    store: torch.Tensor
    start: int
    end: int
    offset: int

    def fragment(self, logical: Logical) -> Fragment:
        """Select the elements that belong to one logical matrix.

        Args:
            logical: a logical matrix of the parameter.
        """
        spans = logical.spans(self.start, self.end)
        return Fragment(self.store, tuple((self.offset + lo, self.offset + hi) for lo, hi in spans))


def read_placement(parameters: Sequence[Sequence[torch.nn.Parameter]], groups: Sequence[dict[str, Any]]) -> Placement:
    """Find where the elements of every parameter are stored.

    Args:
        parameters: for each group, the trainable parameters that it was built with.
        groups: the optimizer's current ``param_groups``, in the same order.

    Raises:
        RuntimeError: if an unknown wrapper rearranged the groups.
        ConfigError: if a parameter is not contiguous.
    """
    # The groups decide, not the parameters' marks, because those may be left over from an engine that is gone.
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
        "matrix an element belongs to. Use no wrapper, or DeepSpeed 0.19 at ZeRO 0 to 3 in fp32, bf16 or fp16."
    )


def with_copies(placement: Placement, data_parallel: dist.ProcessGroup | None) -> Placement:
    """The placement where data-parallel ranks have copies of the weights, and gradients of their own.

    Args:
        placement: as DeepSpeed arranged it.
        data_parallel: these ranks; None for this rank alone.

    Raises:
        ConfigError: DeepSpeed has arranged the parameters, and gradients are reduced and split by it.
    """
    if placement.wrapper != "none":
        raise ConfigError(
            f"reduction 'projected' leaves gradients as backward makes them, and {placement.wrapper} of DeepSpeed "
            "reduces or copies them first: use zero_optimization.stage 0, and with bf16 master_weights false"
        )
    return replace(placement, process_group=data_parallel)


def read_intervals(
    intervals: Sequence[Interval], tensor_rank: int, process_group: dist.ProcessGroup | None
) -> tuple[list[int], list[list[Range]]]:
    """Exchange what every rank of a group holds of each parameter, by one all-gather.

    Args:
        intervals: what this rank holds, one interval per parameter; the same parameters on all ranks.
        tensor_rank: this rank's index among the tensor-parallel ranks.
        process_group: the ranks that hold the parameters together; None for this rank alone.

    Returns:
        For each rank, its tensor-parallel rank; and for each rank, the ``(start, end)`` of each parameter.

    Raises:
        ConfigError: if ranks would step a parameter in different calls of ``step``; on all ranks.
    """
    numbers = {store: number for number, store in enumerate(dict.fromkeys(id(i.store) for i in intervals))}
    own = [(tensor_rank, 0, 0), *((i.start, i.end, numbers[id(i.store)]) for i in intervals)]
    if process_group is None or not intervals:
        return [tensor_rank], [[(start, end) for start, end, _ in own[1:]]]
    local = torch.tensor(own, dtype=torch.int64, device=intervals[0].store.device)
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(gathered, local, group=process_group)
    if any(not torch.equal(rows[1:, 2], local[1:, 2]) for rows in gathered):
        raise ConfigError(
            "ZeRO 3 puts parameters into different sub-groups on tensor-parallel ranks whose shards differ in size: "
            "leave zero_optimization.sub_group_size at its default, or choose a degree that divides all widths"
        )
    found = [[(start, end) for start, end, _ in rows.tolist()] for rows in gathered]
    return [rows[0][0] for rows in found], [rows[1:] for rows in found]


def forward_weights(parameter: torch.nn.Parameter) -> tuple[Interval, bool]:
    """Find the weights that a forward pass on this rank reads.

    At ZeRO 3 a forward pass gathers the partitions, but not those of a parameter that is gathered already. Call
    :func:`release_gathered` before changing them, or the change is not seen.

    Args:
        parameter: a parameter of the model.

    Returns:
        The elements, and whether they are only this rank's partition of the parameter (ZeRO 3).
    """
    tensor: Any = parameter
    if getattr(tensor, "ds_tensor", None) is None:
        return Interval(parameter, start=0, end=parameter.numel(), offset=0), False
    start, end = _own_share(tensor)
    return Interval(tensor.ds_tensor, start=start, end=end, offset=0), True


def release_gathered(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Release every gathered parameter of the model at ZeRO 3; the next forward pass gathers them again.

    Args:
        parameters: some parameters of the model; nothing is done for those that ZeRO 3 does not manage.
    """
    wrappers = {id(p._z3_optimizer): p._z3_optimizer for p in parameters if hasattr(p, "_z3_optimizer")}
    for wrapper in wrappers.values():
        wrapper.parameter_offload.partition_all_parameters()


def renew_forward_weights(wrapper: Any) -> None:
    """Write what forward passes read from the masters that DeepSpeed's wrapper has. Collective at ZeRO 1 to 3.

    Args:
        wrapper: the engine's ``optimizer``.
    """
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # ZeRO 3
        for number, masters in enumerate(wrapper.fp32_partitioned_groups_flat):
            if masters.numel():
                wrapper._reassign_or_swap_out_partitioned_parameters(number)
    elif hasattr(wrapper, "update_lp_params"):  # ZeRO 1 and 2, BF16_Optimizer
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_groups"):  # FP16_UnfusedOptimizer
        for own, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for parameter, master in zip(own, masters, strict=True):
                parameter.data.copy_(master.data)


def unpartitioned_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter on this tensor-parallel rank, even if ZeRO 3 has emptied it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _is_untouched(own: Sequence[torch.nn.Parameter], group: dict[str, Any]) -> bool:
    """Whether the group still has the parameters themselves."""
    return len(own) == len(group["params"]) and all(a is b for a, b in zip(own, group["params"], strict=True))


def _are_clones(own: Sequence[torch.nn.Parameter], group: dict[str, Any]) -> bool:
    """Whether the group has one tensor of the same shape for each parameter."""
    clones = group["params"]
    return len(own) == len(clones) and all(a.shape == b.shape for a, b in zip(own, clones, strict=True))


def _is_stage3(own: Sequence[torch.nn.Parameter], group: dict[str, Any]) -> bool:
    """Whether ZeRO 3 manages the group: empty, or with one flat partition while its sub-group is stepped."""
    partitions = {
        id(p) for q in own if hasattr(q, "_z3_optimizer") for p in q._z3_optimizer.fp32_partitioned_groups_flat
    }
    return all(hasattr(q, "_z3_optimizer") for q in own) and all(id(p) in partitions for p in group["params"])


def _whole_parameter(parameter: torch.nn.Parameter, store: torch.Tensor) -> Interval:
    """All elements of a parameter that is stored in a tensor of its own."""
    if not store.is_contiguous():
        raise ConfigError(
            f"a parameter of shape {tuple(parameter.shape)} is not contiguous in memory (a transposed view?), but its "
            "elements are updated in storage order: make it contiguous before building the optimizer"
        )
    return Interval(store, start=0, end=parameter.numel(), offset=0)


def _flat_partitions(parameters: Sequence[Sequence[torch.nn.Parameter]], groups: Sequence[dict[str, Any]]) -> Placement:
    """The placement at ZeRO 1 and 2 and under BF16_Optimizer."""
    process_group = next(parameter._dp_group for own in parameters for parameter in own)  # type: ignore[attr-defined]
    intervals = [
        [_by_storage(parameter, group["params"][0], process_group) for parameter in own]
        for own, group in zip(parameters, groups, strict=True)
    ]
    pairs = (
        (parameter, group["params"][0]) for own, group in zip(parameters, groups, strict=True) for parameter in own
    )
    is_offloaded = any(_is_offloaded(parameter, partition) for parameter, partition in pairs)
    return Placement("flat fp32 partitions", intervals, process_group, is_offloaded)


def _is_offloaded(parameter: torch.nn.Parameter, partition: torch.Tensor) -> bool:
    """Whether a partition of ZeRO 1 or 2 is offloaded; where the model is on the CPU too, only a mark tells."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    return partition.device != parameter.device or (mapping is not None and bool(mapping.use_offload))


def _by_storage(parameter: torch.nn.Parameter, partition: torch.Tensor, process_group: dist.ProcessGroup) -> Interval:
    """The overlap of a parameter with this rank's partition of its group.

    The model's parameters are views of one flat buffer per group, and every rank updates an equal share of it. So a
    parameter's storage offset is its position in the buffer. DeepSpeed's own ``_hp_mapping`` says the same, except
    under ``round_robin_gradients``: DeepSpeed 0.19.8 reorders the parameters and records the old order.
    """
    size, world = partition.numel(), dist.get_world_size(process_group)
    buffer = parameter.untyped_storage().nbytes() // parameter.element_size()
    if parameter.numel() and buffer != size * world:
        raise RuntimeError(
            f"a parameter is a view of a buffer of {buffer} elements, but {world} partitions of {size} were expected: "
            "this version of DeepSpeed has another layout at ZeRO 1 and 2; use deepspeed 0.19.8"
        )
    first = dist.get_rank(process_group) * size
    position = int(parameter.storage_offset())
    lo, hi = max(first, position), min(first + size, position + parameter.numel())
    if lo >= hi:
        return Interval(partition, start=0, end=0, offset=0)
    return Interval(partition, start=lo - position, end=hi - position, offset=lo - first)


def _stage3(parameters: Sequence[Sequence[torch.nn.Parameter]]) -> Placement:
    """The placement at ZeRO 3."""
    intervals, process_group, is_offloaded = [], None, False
    for own in parameters:
        found = []
        for parameter in own:
            tensor: Any = parameter
            zero = tensor._z3_optimizer
            sub_group, offset, _ = zero.grad_position[zero.get_param_id(tensor)]
            process_group, is_offloaded = tensor.ds_process_group, bool(zero.offload_optimizer)
            start, end = _own_share(tensor)
            partition = zero.fp32_partitioned_groups_flat[sub_group]
            found.append(Interval(partition, start=start, end=end, offset=offset))
        intervals.append(found)
    return Placement("ZeRO stage 3 partitions", intervals, process_group, is_offloaded)


def _own_share(tensor: Any) -> Range:
    """This rank's ``[start, end)`` of a parameter that ZeRO 3 partitions evenly."""
    size = tensor.partition_numel()
    start = min(size * dist.get_rank(tensor.ds_process_group), tensor.ds_numel)
    return start, min(start + size, tensor.ds_numel)
