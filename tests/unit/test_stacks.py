"""Stacks of experts read as the matrices in them: which parameters are stacks, and where every element is."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ds_lowrank
from ds_lowrank.errors import ConfigError
from ds_lowrank.placement.parameter_names import tag_of, tag_parameters
from ds_lowrank.placement.stacks import is_stored_transposed, mark_stacks, stack_of
from ds_lowrank.placement.tensor_parallel import logical_matrices
from tests.simulated.tensor_parallel import FakeGrid, autotp_parameter, megatron_parameter

NAME = "layers.0.experts.w"


def numbered(*shape):
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def read_back(shards, shapes, fused, whole_shapes):
    """Every matrix of a stack, put together from what each tensor-parallel rank says it holds of it."""
    found = {}
    for rank, shard in enumerate(shards):
        for one in logical_matrices(shard, shapes[rank], NAME, FakeGrid(rank, len(shards))):
            assert one.name == f"{NAME}.{one.piece}"
            assert one.shape == whole_shapes[one.piece]
            matrix = found.setdefault(one.piece, torch.full(one.shape, torch.nan))
            flat = shard.data.reshape(-1)
            for strip in one.strips[rank]:
                rows, cols = strip.block.rows, strip.block.cols
                part = flat[strip.start : strip.start + strip.block.numel]
                matrix[slice(*rows), slice(*cols)] = part.view(rows[1] - rows[0], cols[1] - cols[0])
    return found


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_element_of_a_stack_is_where_its_rank_says(data):
    tensor, dim = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([None, 0, 1, 2]))
    fused = data.draw(st.booleans()) and dim != 2
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=tensor, max_size=tensor))
    shape = [data.draw(st.integers(1, 4)) for _ in range(3)]
    if fused:
        shape[1] = 2 * shape[1]
        sizes = [2 * size for size in sizes] if dim == 1 else sizes
    if dim is not None:
        shape[dim] = sum(sizes)
    whole = numbered(*shape)
    spans = list(pairwise([0, *accumulate(sizes)])) if dim is not None else [None] * tensor
    locals_ = [whole if span is None else whole.narrow(dim, span[0], span[1] - span[0]).contiguous() for span in spans]
    shards = []
    for local in locals_:
        shard = autotp_parameter(local.shape, dim, tuple(sizes), replicated=dim is None)
        shard.data = local.clone()
        if fused:
            ds_lowrank.tag_fused(shard, {"gate": shape[1] // 2, "up": shape[1] // 2})
        ds_lowrank.tag_stack(shard)
        shards.append(shard)
    if fused:
        expected = {
            f"{e}.{piece}": half
            for e in range(shape[0])
            for piece, half in zip(("gate", "up"), whole[e].chunk(2), strict=True)
        }
    else:
        expected = {str(e): whole[e] for e in range(shape[0])}
    shapes = {piece: tuple(matrix.shape) for piece, matrix in expected.items()}
    found = read_back(shards, [tuple(local.shape) for local in locals_], fused, shapes)
    assert found.keys() == expected.keys()
    for piece, matrix in expected.items():
        assert torch.equal(found[piece], matrix)


def test_an_expert_that_is_whole_on_one_rank_is_projected_locally_under_its_own_name():
    shard = megatron_parameter((2, 3, 4), 0)
    ds_lowrank.tag_stack(shard)
    found = logical_matrices(shard, (2, 3, 4), NAME, FakeGrid(1, 2))
    assert [one.owner for one in found] == [0, 0, 1, 1]
    local = found[3].as_local()
    assert (local.name, local.shape, local.placement) == (f"{NAME}.3", (3, 4), "local")
    assert local.strips == (found[3].strips[1],) * 2


def test_a_matrix_that_is_viewed_as_a_stack_has_the_layout_of_the_view():
    """megatron-core's ``weight1``: hidden x (E f) in the parameter, E x hidden x f as it is used; f is split."""
    experts, hidden, width = 3, 4, 6
    whole = numbered(experts, hidden, width)
    halves = [half.contiguous() for half in whole.chunk(2, dim=2)]
    shards = []
    for half in halves:
        shard = megatron_parameter((hidden, experts * width // 2), 1)
        shard.data = half.reshape(hidden, -1).clone()
        ds_lowrank.tag_stack(shard, experts, rows=hidden)
        shards.append(shard)
    shapes = dict.fromkeys(map(str, range(experts)), (hidden, width))
    found = read_back(shards, [tuple(shard.shape) for shard in shards], False, shapes)
    for number, matrix in enumerate(whole):
        assert torch.equal(found[str(number)], matrix)


def small(kind, **changes):
    """A model of transformers with few small layers, on the meta device."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = CONFIG_MAPPING[kind](num_hidden_layers=2, **changes)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(settings)


@pytest.mark.parametrize(
    ("kind", "changes", "stacks", "share"),
    [
        ("mixtral", {}, {"gate_up_proj": 8, "down_proj": 8}, 0.9),
        ("qwen3_moe", {}, {"gate_up_proj": 128, "down_proj": 128}, 0.9),
        ("olmoe", {}, {"gate_up_proj": 64, "down_proj": 64}, 0.9),
        ("gpt_oss", {"num_local_experts": 4}, {"gate_up_proj": 4, "down_proj": 4}, 0.9),
        ("granitemoe", {"num_local_experts": 4}, {"gate_up_proj": 4, "down_proj": 4}, 0.9),
        ("jetmoe", {"num_local_experts": 4}, {"weight": 4}, 0.9),
        ("dbrx", {}, {"w1": 16, "v1": 16, "w2": 16}, 0.9),
    ],
)
def test_experts_of_transformers_are_stacks_and_nearly_all_of_a_layer_is_matrices(kind, changes, stacks, share):
    """All but embeddings, head and vectors: today's mixtures have no other parameters."""
    changes = {"n_layers": 2} if kind == "dbrx" else changes
    if kind == "dbrx":
        from transformers import DbrxConfig, DbrxForCausalLM

        with torch.device("meta"):
            model = DbrxForCausalLM(
                DbrxConfig(
                    n_layers=2,
                    d_model=64,
                    n_heads=4,
                    ffn_config={"moe_num_experts": 16},
                    attn_config={"rope_theta": 1e4},
                )
            )
    else:
        model = small(kind, **changes)
    tag_parameters(model)
    found, inside, matrices = {}, 0, 0
    for name, parameter in model.named_parameters():
        shape, tag = tuple(parameter.shape), tag_of(parameter)
        stack = stack_of(parameter, shape)
        if stack is not None:
            found[name.rpartition(".")[2]] = stack.count
        if tag.kind in ("embedding", "head") or len(shape) == 1:
            continue
        inside += parameter.numel()
        ones = logical_matrices(parameter, shape, tag.name, FakeGrid(0, 1))
        matrices += sum(len(one.shape) == 2 for one in ones) and (tag.kind == "weight") * parameter.numel()
        if stack is not None:
            assert len(ones) == stack.count
    assert found == stacks
    assert matrices > share * inside
    if kind == "gpt_oss":
        biases = [tag_of(p).kind for n, p in model.named_parameters() if n.endswith("proj_bias")]
        assert set(biases) == {"vectors"}


class GroupedMLP(torch.nn.Module):
    """The weights of megatron-core's layer of this name, which needs a GPU."""

    def __init__(self):
        super().__init__()
        self.num_local_experts, self.config = 3, type("Config", (), {"hidden_size": 4})
        self.weight1, self.weight2 = torch.nn.Parameter(torch.empty(4, 30)), torch.nn.Parameter(torch.empty(15, 4))


def test_the_experts_of_megatron_core_are_stacks():
    module = GroupedMLP()
    mark_stacks(module)
    for parameter, matrix in ((module.weight1, (4, 10)), (module.weight2, (5, 4))):
        found = logical_matrices(parameter, tuple(parameter.shape), "w", FakeGrid(0, 1))
        assert [one.shape for one in found] == [matrix] * 3
    assert is_stored_transposed(module, "weight1")


class Positions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = torch.nn.Parameter(torch.empty(1, 7, 5))


class ExpertsWithRouter(torch.nn.Module):
    """What is beside the experts in a module of theirs: a router with a column for each, and vectors."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.router = 4, torch.nn.Parameter(torch.empty(8, 4))
        self.b1, self.scales = torch.nn.Parameter(torch.empty(4, 1, 8)), torch.nn.Parameter(torch.empty(4, 8, 1))


class ExpertLinear(torch.nn.Linear):
    """The layer of one of four experts."""

    num_experts = 4


@pytest.mark.parametrize("module", [torch.nn.Conv1d(3, 4, 5), Positions(), ExpertsWithRouter(), ExpertLinear(6, 8)])
def test_what_is_like_a_stack_in_shape_or_name_is_none(module):
    mark_stacks(module)
    assert all(stack_of(p, tuple(p.shape)) is None for p in module.parameters())


@pytest.mark.parametrize(
    ("shape", "given"), [((4,), {}), ((6, 5), {}), ((6, 5), {"matrices": 4}), ((2, 3, 4), {"matrices": 3})]
)
def test_what_is_not_a_stack_is_refused(shape, given):
    with pytest.raises(ConfigError, match=r"is not a stack of .* It must be E x m x n"):
        ds_lowrank.tag_stack(torch.nn.Parameter(torch.empty(shape)), **given)
