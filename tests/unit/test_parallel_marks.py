"""The layout of logical matrices, read off the marks that tensor parallelism leaves on parameters."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import ds_lowrank
from ds_lowrank.errors import ConfigError
from ds_lowrank.placement.tensor_parallel import logical_matrices
from ds_lowrank.sharding.layout import Block, ContiguousPart
from tests.engines.pool import run_ranks
from tests.simulated.tensor_parallel import FakeGrid, autotp_parameter, megatron_parameter

MARKED = {
    "column-parallel": ((12, 6), 0, (4, 4, 4), lambda shape, own: megatron_parameter(shape, 0)),
    "row-parallel": ((6, 12), 1, (4, 4, 4), lambda shape, own: megatron_parameter(shape, 1)),
    "AutoTP rows": ((12, 6), 0, (4, 4, 4), lambda shape, own: autotp_parameter(shape, 0, (4, 4, 4))),
    "AutoTP uneven rows": ((11, 6), 0, (5, 4, 2), lambda shape, own: autotp_parameter(shape, 0, (5, 4, 2))),
    "AutoTP uneven columns": ((6, 11), 1, (2, 5, 4), lambda shape, own: autotp_parameter(shape, 1, (2, 5, 4))),
}


@pytest.mark.parametrize("own", range(3))
@pytest.mark.parametrize("marks", MARKED)
def test_marks_give_the_blocks_of_a_split_written_by_hand(marks, own):
    shape, dim, sizes, parameter = MARKED[marks]
    ends = [sum(sizes[:t]) for t in range(4)]
    blocks = [Block(span, (0, shape[1])) if dim == 0 else Block((0, shape[0]), span) for span in pairwise(ends)]
    local = tuple(sizes[own] if axis == dim else size for axis, size in enumerate(shape))
    (logical,) = logical_matrices(parameter(local, own), local, "w", FakeGrid(own, 3))
    assert (logical.name, logical.shape, logical.own, logical.placement) == ("w", shape, own, "sharded")
    for t, block in enumerate(blocks):
        for start in range(block.numel):
            for end in range(start + 1, block.numel + 1):
                assert logical.part(t, start, end) == ContiguousPart(block, start, end)
                if t == own:
                    assert logical.spans(start, end) == ((0, end - start),)
        assert logical.part(t, 3, 3).numel == 0


@pytest.mark.parametrize("own", range(2))
def test_a_stride_gives_each_rank_a_share_of_every_matrix_in_the_weight(own):
    """The gate and up projections of a gated layer, stacked on every rank."""
    whole = {"w.0": torch.arange(40.0).view(8, 5), "w.1": torch.arange(40.0, 80.0).view(8, 5)}
    halves = [torch.cat([matrix[4 * t : 4 * t + 4] for matrix in whole.values()]).view(-1) for t in range(2)]
    found = logical_matrices(megatron_parameter((8, 5), 0, stride=2), (8, 5), "w", FakeGrid(own, 2))
    assert [(logical.name, logical.shape, logical.placement) for logical in found] == [
        ("w.0", (8, 5), "sharded"),
        ("w.1", (8, 5), "sharded"),
    ]
    for start in range(0, 40, 3):
        for end in range(start, 41, 3):
            for logical in found:
                held = elements(whole[logical.name], logical.part(own, start, end))
                stored = [halves[own][start:end][slice(*span)] for span in logical.spans(start, end)]
                assert torch.equal(held, torch.cat([held[:0], *stored]))
            assert sum(logical.part(own, start, end).numel for logical in found) == end - start


def elements(whole, held):
    """The elements of a matrix that a part stores, in storage order."""
    pieces = [whole[r.row : r.row + r.height, r.col : r.col + r.width].reshape(-1) for r in held.rectangles]
    return torch.cat([whole.new_empty(0), *pieces])


def test_a_split_vector_is_one_row_and_unmarked_parameters_are_replicated():
    for parameter in (megatron_parameter((4,), 0), autotp_parameter((4,), 0, (4, 4))):
        (bias,) = logical_matrices(parameter, (4,), "b", FakeGrid(1, 2))
        assert (bias.shape, bias.placement, bias.part(1, 1, 3)) == (
            (8,),
            "sharded",
            ContiguousPart(Block((0, 1), (4, 8)), 1, 3),
        )
    unmarked = torch.nn.Parameter(torch.empty(4, 6))
    for parameter in (unmarked, megatron_parameter((4, 6), None), autotp_parameter((4, 6), replicated=True)):
        (replicated,) = logical_matrices(parameter, (4, 6), "w", FakeGrid(1, 2))
        assert (replicated.shape, replicated.placement) == ((4, 6), "replicated")
        assert replicated.part(0, 5, 20) == replicated.part(1, 5, 20) == ContiguousPart(Block((0, 4), (0, 6)), 5, 20)
        assert replicated.as_local() is replicated
        (alone,) = logical_matrices(parameter, (4, 6), "w", FakeGrid(0, 1))
        assert (alone.shape, alone.placement) == ((4, 6), "sharded")


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (lambda: megatron_parameter((4, 6), 2), "partition_dim does not say how it is split"),
        (lambda: autotp_parameter((4, 6), 0, (4, 4), sub_param_sizes=(2, 2)), "exclude it from AutoTP"),
        (lambda: autotp_parameter((4, 6), 0, None), "exclude it from AutoTP"),
    ],
)
def test_marks_without_a_usable_split_are_refused(parameter, message):
    with pytest.raises(ConfigError, match=message):
        logical_matrices(parameter(), (4, 6), "w", FakeGrid(0, 2))


def sharded_by_fsdp2(model):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def sharded_by_fsdp1(model, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def split_by_torch(model):
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    return parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})


def quantized(model):
    """As torchao stores a weight: another tensor inside a tensor."""
    model[0].weight = torch.nn.Parameter(Wrapped(model[0].weight.data))
    return model


class Wrapped(torch.Tensor):
    """A tensor subclass without elements of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=False)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


FOREIGN = {
    "FSDP2": (sharded_by_fsdp2, "a DTensor, as fully_shard (FSDP2)"),
    "FSDP1, flat": (lambda model: sharded_by_fsdp1(model, False), "a part of a flat parameter"),
    "FSDP1, original parameters": (lambda model: sharded_by_fsdp1(model, True), "a part of a flat parameter"),
    "tensor parallelism of PyTorch": (split_by_torch, "a DTensor"),
    "a quantized weight": (quantized, "a Wrapped, a tensor subclass"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_parameters_that_another_library_stores_in_its_own_way_are_refused(kind):
    for message in run_ranks(1, refusal_of, kind):
        assert FOREIGN[kind][1] in message
        assert "DeepSpeed's ZeRO, which it reads, splits a model over ranks like FSDP" in message


def refusal_of(kind):
    model = FOREIGN[kind][0](torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)))
    try:
        ds_lowrank.GaLore(model, rank=2)
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_an_optimizer_whose_parameters_were_given_to_fsdp_later_is_refused_in_its_first_step():
    assert "a part of a flat parameter" in run_ranks(1, wrapped_later)[0]


def wrapped_later():
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    optimizer = ds_lowrank.GaLore(model, rank=2)
    wrapped = sharded_by_fsdp1(model, use_orig_params=True)
    wrapped(torch.ones(2, 6)).sum().backward()
    try:
        optimizer.step()
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_experts_that_are_split_over_expert_ranks_are_refused_on_every_way_in():
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    model[1].weight.allreduce = False
    with pytest.raises(ConfigError, match=r"1\.weight is split over expert ranks"):
        ds_lowrank.GaLore(model, rank=2)
    group = {"params": [model[1].weight], "name": "experts", "moe": True}  # as DeepSpeed makes it from its layers
    with pytest.raises(ConfigError, match=r"1\.weight is split over expert ranks"):
        ds_lowrank.GaLore([group, {"params": [model[0].weight]}], rank=2)


def test_a_frozen_parameter_may_be_stored_in_any_way():
    model = quantized(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)))
    model[0].weight.requires_grad_(False)
    optimizer = ds_lowrank.GaLore(model, rank=2)
    assert [slot.tag.name for slot in optimizer.slots] == ["0.bias", "1.weight", "1.bias"]
