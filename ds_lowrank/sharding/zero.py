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
from ds_lowrank.sharding.layout import Part, whole

NO_OFFLOAD = "optimizer offload is not supported: remove zero_optimization.offload_optimizer"


@dataclass
class Fragment:
    """This rank's elements ``[start, end)`` of one parameter, ``offset`` elements into ``store``.

    ``store`` is what DeepSpeed updates in one ``step()``: the parameter itself, its fp32 clone, or a flat partition. A
    rank that holds nothing of the parameter still knows the store that the others update with it.
    """

    store: torch.Tensor
    start: int
    end: int
    offset: int

    @property
    def weights(self) -> torch.Tensor:
        """The elements, flat: a view of the store."""
        return self.store.data.view(-1)[self.offset : self.offset + self.end - self.start]

    @property
    def gradient(self) -> torch.Tensor:
        """Their gradient, flat. Only while the store has one."""
        gradient = self.store.grad
        assert gradient is not None
        return gradient.reshape(-1)[self.offset : self.offset + self.end - self.start]


@dataclass
class Placement:
    """Where all parameters of an optimizer lie.

    Attributes:
        wrapper: for the log.
        fragments: one a parameter, group by group, in the order given.
        process_group: the ranks over which they are split; None where every rank holds them whole.
    """

    wrapper: str
    fragments: list[list[Fragment]]
    process_group: dist.ProcessGroup | None


def logical_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, also where ZeRO 3 has emptied it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def read_placement(parameters: Sequence[Sequence[torch.nn.Parameter]], groups: Sequence[dict[str, Any]]) -> Placement:
    """Find every parameter's elements.

    Args:
        parameters: the trainable parameters each group was built with.
        groups: the optimizer's param groups as they are now, in the same order.

    Raises:
        RuntimeError: a wrapper that this package does not know rearranged the groups.
    """
    # Decided by what the groups hold now: a parameter may still carry marks of an engine that is gone.
    both = list(zip(parameters, groups, strict=True))
    if all(_is_untouched(own, group) for own, group in both):
        return Placement("none", [[_entire(p, p) for p in own] for own in parameters], None)
    if all(_are_clones(own, group) for own, group in both):
        pairs = [zip(own, group["params"], strict=True) for own, group in both]
        return Placement("FP16_UnfusedOptimizer", [[_entire(p, clone) for p, clone in pair] for pair in pairs], None)
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


def _entire(parameter: torch.nn.Parameter, store: torch.Tensor) -> Fragment:
    if not store.is_contiguous():
        raise ConfigError(
            f"a parameter of shape {tuple(parameter.shape)} is not contiguous in memory (a transposed view?), and its "
            "elements are updated in place in their order: make it contiguous before building the optimizer"
        )
    return Fragment(store, 0, parameter.numel(), 0)


def _flat_partitions(parameters: Sequence[Sequence[torch.nn.Parameter]], groups: Sequence[dict[str, Any]]) -> Placement:
    process_group = next(parameter._dp_group for own in parameters for parameter in own)  # type: ignore[attr-defined]
    fragments = [
        [_by_storage(parameter, group["params"][0], process_group) for parameter in own]
        for own, group in zip(parameters, groups, strict=True)
    ]
    return Placement("flat fp32 partitions", fragments, process_group)


def _by_storage(parameter: torch.nn.Parameter, partition: torch.Tensor, process_group: dist.ProcessGroup) -> Fragment:
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
        return Fragment(partition, 0, 0, 0)
    return Fragment(partition, start - offset, end - offset, start - low)


def _stage3(parameters: Sequence[Sequence[torch.nn.Parameter]]) -> Placement:
    fragments, process_group = [], None
    for own in parameters:
        found = []
        for parameter in own:
            tensor: Any = parameter
            zero = tensor._z3_optimizer
            if zero.offload_optimizer:
                raise ConfigError(NO_OFFLOAD)
            sub_group, offset, _ = zero.grad_position[zero.get_param_id(tensor)]
            process_group = tensor.ds_process_group
            size = tensor.partition_numel()
            start = min(size * dist.get_rank(process_group), tensor.ds_numel)
            end = min(start + size, tensor.ds_numel)
            found.append(Fragment(zero.fp32_partitioned_groups_flat[sub_group], start, end, offset))
        fragments.append(found)
    return Placement("ZeRO stage 3 partitions", fragments, process_group)


def forward_weights(parameter: torch.nn.Parameter) -> tuple[torch.Tensor, bool]:
    """What a forward pass on this rank computes with: the elements, flat, and whether they are its partition only.

    At stage 3 a forward pass gathers the partitions. It does not see a change of a partition whose parameter is
    gathered already: :func:`release_gathered` comes first.
    """
    tensor: Any = parameter
    if getattr(tensor, "ds_tensor", None) is None:
        return parameter.data.view(-1), False
    size = tensor.partition_numel()
    start = min(size * dist.get_rank(tensor.ds_process_group), tensor.ds_numel)
    return tensor.ds_tensor.data[: min(size, tensor.ds_numel - start)], True


def release_gathered(parameters: Iterable[torch.nn.Parameter]) -> None:
    """At stage 3, let go of every parameter of the model that is gathered; the next forward pass gathers it again."""
    wrappers = {id(p._z3_optimizer): p._z3_optimizer for p in parameters if hasattr(p, "_z3_optimizer")}
    for wrapper in wrappers.values():
        wrapper.parameter_offload.partition_all_parameters()


def read_parts(
    shapes: Sequence[tuple[int, ...]], fragments: Sequence[Fragment], process_group: dist.ProcessGroup | None
) -> list[list[Part]]:
    """What every rank of the group holds of each parameter, by one all-gather of the intervals.

    Returns:
        ``parts[i][rank]``. A parameter that is not a matrix counts as one row.
    """
    as_matrices = [shape if len(shape) == 2 else (1, max(1, _numel(shape))) for shape in shapes]
    own = [(f.start, f.end) for f in fragments]
    if process_group is None or not own:
        return [[whole(shape, *interval)] for shape, interval in zip(as_matrices, own, strict=True)]
    mine = torch.tensor(own, dtype=torch.int64, device=fragments[0].store.device)
    world = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(world, mine, group=process_group)
    everyone = [intervals.tolist() for intervals in world]
    return [[whole(shape, *intervals[i]) for intervals in everyone] for i, shape in enumerate(as_matrices)]


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
