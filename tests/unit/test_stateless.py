"""Methods without a rank, and matrices of which nothing is stored: SCALE without a momentum."""

from __future__ import annotations

import pytest
import torch

import ds_lowrank
from ds_lowrank.errors import CheckpointError
from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer import stacks
from ds_lowrank.optimizer.matrices import Matrices
from ds_lowrank.optimizer.report import role_table, state_bytes, take_inventory
from ds_lowrank.placement.fragment import Fragment
from ds_lowrank.reference import DenseScale
from ds_lowrank.sharding.layout import whole

SHAPES = {"a": (6, 4), "b": (4, 6), "c": (6, 4), "d": (5, 5)}
MOMENTUM = {"b": 0.9, "d": 0.5}


def weights_of(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def optimizer_of(weights: dict[str, torch.nn.Parameter], momentum: dict[str, float], **options) -> ds_lowrank.Scale:
    groups = [{"params": [(name, w)], "momentum": momentum.get(name, 0.0)} for name, w in weights.items()]
    return ds_lowrank.Scale(groups, lr=0.1, **options)


def take_step(optimizer: ds_lowrank.Scale, weights: dict[str, torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("room", [1, 30, 2**28])
def test_matrices_with_and_without_state_share_buckets_and_match_the_reference(monkeypatch, room):
    monkeypatch.setattr(stacks, "BUCKET_ELEMENTS", room)
    weights = weights_of()
    dense = {n: DenseScale(w.detach().clone(), momentum=MOMENTUM.get(n, 0.0), lr=0.1) for n, w in weights.items()}
    optimizer = optimizer_of(weights, MOMENTUM)
    for step in range(4):
        take_step(optimizer, weights, step)
        for name, weight in weights.items():
            dense[name].step(weight.grad)
    for name, weight in weights.items():
        assert torch.allclose(weight, dense[name].weight, atol=1e-6), name


def test_many_matrices_without_state_fill_buckets_in_any_order(monkeypatch):
    """The first matrix has no numbers of state, and neither has the last."""
    monkeypatch.setattr(stacks, "BUCKET_ELEMENTS", 3)
    builder, options = Matrices(METHODS["Scale"], 0), METHODS["Scale"].Options()
    matrices = []
    for number in range(10):
        store = torch.nn.Parameter(torch.zeros(24))
        fragment = Fragment(store, ((0, 24),))
        matrices.append(builder.projected(f"w{number}", (6, 4), [whole((6, 4), 0, 24)], options, fragment))
    builder.make_states()
    buckets = stacks.Stacks(METHODS["Scale"]).buckets(matrices)
    assert [[len(stack.matrices) for stack in bucket] for bucket in buckets] == [[3], [3], [3], [1]]
    assert all(set(matrix.state) == {"step"} for matrix in matrices)


def test_role_table_shows_no_rank_and_no_bytes():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
    optimizer = ds_lowrank.Scale(model, lr=0.1)
    table = role_table([take_inventory(optimizer.slots, [])], state_bytes(optimizer.slots), 1)
    assert [line.split()[-2:] for line in table.splitlines() if ".weight" in line] == [["right", "-"]] * 2
    assert "moments and bases 0.00 MiB" in table
    assert state_bytes(optimizer.slots)[0] == 0
    assert optimizer.metrics()["lowrank/state_bytes"] == optimizer.metrics()["lowrank/mean_rank"] == 0


def test_state_dict_of_nothing_resumes_and_another_momentum_is_refused():
    weights = weights_of()
    optimizer = optimizer_of(weights, MOMENTUM)
    for step in range(3):
        take_step(optimizer, weights, step)
    saved = optimizer.state_dict()
    assert set(saved["state"]["a"]) == {"step"} and set(saved["state"]["b"]) == {"step", "momentum"}
    twins = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}
    resumed = optimizer_of(twins, MOMENTUM)
    resumed.load_state_dict(saved)
    take_step(optimizer, weights, 3)
    take_step(resumed, twins, 3)
    assert all(torch.equal(weights[name], twins[name]) for name in weights)
    with pytest.raises(CheckpointError, match=r"momentum is 0\.9 in the checkpoint and 0\.0 in this run"):
        optimizer_of(twins, {"d": 0.5}).load_state_dict(saved)


def test_a_gradient_without_elements_here_takes_part():
    """A rank that has none of a matrix without state, beside one that has it all."""
    builder = Matrices(METHODS["Scale"], 0)
    parts = [whole((6, 4), 0, 0), whole((6, 4), 0, 24)]
    fragment = Fragment(torch.nn.Parameter(torch.zeros(0)), ())
    matrix = builder.projected("w", (6, 4), parts, METHODS["Scale"].Options(), fragment)
    builder.make_states()
    ((stack,),) = stacks.Stacks(METHODS["Scale"]).buckets([matrix])
    stack.attach()
    assert not stack.is_here and stack.state == {"step": 0}
    stack.store(stack.state)
    assert matrix.state == {"step": 1}


def test_published_groups_step_head_and_embedding_by_scale():
    """The head with a momentum; of the embedding, which is stored input x output, the columns."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"embed_tokens": torch.nn.Embedding(9, 5), "lm_head": torch.nn.Linear(5, 9, bias=False)}
    )
    ds_lowrank.tag_parameters(model)
    embedding, head = model["embed_tokens"].weight, model["lm_head"].weight
    twins = (
        DenseScale(embedding.detach().clone(), lr=0.1, proj_type="left"),
        DenseScale(head.detach().clone(), lr=0.1, momentum=0.9),
    )
    optimizer = ds_lowrank.Scale(
        [
            {"params": [embedding], "target_modules": ["embed_tokens"], "proj_type": "left"},
            {"params": [head], "target_modules": ["lm_head"], "momentum": 0.9},
        ],
        lr=0.1,
    )
    for _ in range(3):
        for weight, twin in zip((embedding, head), twins, strict=True):
            weight.grad = torch.randn(weight.shape)
            twin.step(weight.grad)
        optimizer.step()
    assert torch.allclose(embedding, twins[0].weight, atol=1e-6)
    assert torch.allclose(head, twins[1].weight, atol=1e-6)
