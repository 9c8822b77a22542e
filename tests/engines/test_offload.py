"""``offload_optimizer``: the step on the CPU is the one without offload, bit for bit where the same sums are taken."""

from __future__ import annotations

import functools
import re
from itertools import pairwise

import pytest
import torch

from tests.engines import grids
from tests.engines.pool import run_ranks
from tests.engines.scenario import (
    METHODS,
    Oracle,
    config,
    full_weights,
    make_model,
    max_relative_difference,
    run_engine,
    tokens,
    train_step,
)
from tests.engines.test_state_engines import broken, resume, train_with_a_nan

CPU = {"offload_optimizer": {"device": "cpu"}}
STAGES = (1, 2, 3)
STEPS = 5  # refreshes at steps 0 and 4


def offloaded(stage, *args, **changes):
    """``config`` with offload to the CPU."""
    return config(stage, 2, *args, **changes, zero_optimization=CPU)


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("stage", STAGES)
def test_the_steps_of_every_method_are_those_without_offload(stage, method):
    plain = run_ranks(2, run_engine, config(stage, 2, gas=2, method=method), STEPS)
    for own, result in zip(plain, run_ranks(2, run_engine, offloaded(stage, gas=2, method=method), STEPS), strict=True):
        assert equal(result["first"], own["first"])
        assert equal(result["last"], own["last"])
        assert result["bytes"] == own["bytes"]
        assert result["metrics"] == own["metrics"]


@pytest.mark.parametrize("dtype", ["bf16", "bf16_fp32_accumulation"])
@pytest.mark.parametrize("stage", STAGES)
def test_in_bf16_too(stage, dtype):
    """At stage 1 with fp32 accumulation DeepSpeed even uses another wrapper without offload."""
    plain = run_ranks(2, run_engine, config(stage, 2, dtype, gas=3), STEPS)
    for own, result in zip(plain, run_ranks(2, run_engine, offloaded(stage, dtype, gas=3), STEPS), strict=True):
        assert equal(result["last"], own["last"])


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        (1, {"round_robin_gradients": True}),
        (2, {"overlap_comm": True, "round_robin_gradients": True}),
        (2, {"reduce_bucket_size": 500, "allgather_bucket_size": 500}),
        (2, {"reduce_scatter": False, "offload_optimizer": {"device": "cpu", "pin_memory": False}}),
        (3, {"sub_group_size": 3000, "overlap_comm": True}),
    ],
    ids=str,
)
def test_deepspeeds_ways_to_reduce_change_nothing(stage, zero):
    without = {key: value for key, value in zero.items() if key != "offload_optimizer"}
    plain = run_ranks(2, run_engine, config(stage, 2, gas=2, zero_optimization=without), STEPS)
    for own, result in zip(
        plain, run_ranks(2, run_engine, config(stage, 2, gas=2, zero_optimization=CPU | zero), STEPS), strict=True
    ):
        assert equal(result["last"], own["last"])


@functools.cache
def clipped():
    oracle = Oracle(0.5)
    oracle.step(0)
    first = oracle.weights()
    for step in range(1, STEPS):
        oracle.step(step)
    assert min(oracle.norms) > 0.5, "nothing is clipped: the test tests nothing"
    return first, oracle.weights()


@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_clipping_is_by_the_norm_of_the_whole_gradient(stage, gas):
    """DeepSpeed adds up this norm in another order with offload."""
    for result in run_ranks(2, run_engine, offloaded(stage, gas=gas, clip=0.5), STEPS):
        assert max_relative_difference(result["first"], clipped()[0]) < 1e-5
        assert max_relative_difference(result["last"], clipped()[1]) < 1e-4


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16_fp32_accumulation"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_changes_nothing(stage, dtype):
    oracle = Oracle()
    for step in (0, 1, 3, 4):
        oracle.step(step)
    for result in run_ranks(2, train_with_a_nan, offloaded(stage, dtype), STEPS, 2):
        assert result["skipped"] == 1
        if dtype == "fp32":
            assert max_relative_difference(result["weights"], oracle.weights()) < 1e-4


class Sometimes(torch.nn.Module):
    """A matrix ``b`` that only some of the batches reach."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(24, 24, bias=False), torch.nn.Linear(24, 24, bias=False)
        self.c = torch.nn.Linear(24, 16)

    def forward(self, x, reaches_b):
        x = self.a(x)
        return self.c(x + self.b(x) if reaches_b else x).square().mean()


REACHED = {
    "whole steps": [[True], [False], [False], [True]],
    "the first micro-batch, the last, or none": [[1, 1], [0, 1], [0, 0], [1, 0], [0, 1]],
    "a skipped step": [[1], [float("inf")], [False], [False], [True]],
}
"""For each step, for each micro-batch, whether it reaches ``b``; infinity: it does, and the gradient is not finite."""


def train_sometimes(settings, reached):
    import torch.distributed as dist

    import ds_lowrank

    torch.manual_seed(0)
    engine, *_ = ds_lowrank.initialize(model=Sometimes(), config=settings)
    generator = torch.Generator().manual_seed(dist.get_rank())
    weights = []
    for factors in reached:
        for factor in factors:
            x = torch.randn(4, 24, generator=generator, dtype=torch.float32)
            loss = engine(x.to(next(engine.parameters()).dtype), bool(factor))
            engine.backward(loss * (factor or 1))
            engine.step()
        weights.append(full_weights(engine))
    return weights, engine.skipped_steps


@pytest.mark.parametrize("reached", REACHED, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16_fp32_accumulation"])
@pytest.mark.parametrize("stage", STAGES)
def test_no_gradient_is_used_twice_or_lost(stage, dtype, reached):
    """With DeepSpeed 0.19.8 alone all three cases fail with offload, and at ZeRO 3 without it; ZeRO 2 is right."""
    batches, more = REACHED[reached], {"gas": len(REACHED[reached][0])}
    right, skipped = run_ranks(2, train_sometimes, config(2, 2, dtype, **more), batches)[0]
    assert skipped == (reached == "a skipped step")
    assert [equal(a, b) for a, b in pairwise(right)].count(True) == skipped
    plain = run_ranks(2, train_sometimes, config(stage, 2, dtype, **more), batches)
    results = run_ranks(2, train_sometimes, offloaded(stage, dtype, **more), batches)
    for own, result in zip(plain, results, strict=True):
        assert result[1] == own[1] == skipped
        assert all(equal(a, b) for a, b in zip(result[0], own[0], strict=True))
        if dtype == "fp32":  # bf16 weights flip with the order of sums, which is another at other stages
            assert max(max_relative_difference(a, b) for a, b in zip(own[0], right, strict=True)) < 1e-5


@pytest.mark.parametrize(
    ("stage", "dtype", "method", "state_dtype"),
    [
        (1, "bf16_fp32_accumulation", "GaLore", "fp32"),
        (2, "fp32", "Lorenza", "bf16"),
        (2, "bf16", "AdaRankGrad", "fp32"),
        (3, "bf16", "GaLore", "int8"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(stage, dtype, method, state_dtype, tmp_path):
    settings = offloaded(stage, dtype, method=method, params={"state_dtype": state_dtype})
    through = run_ranks(2, resume, settings, "", None, 7)
    for a, b in zip(through, run_ranks(2, resume, settings, str(tmp_path), 5, 7), strict=True):
        assert equal(a, b)


def save_and_continue(settings, later, directory):
    """Five steps, of which the last two in an engine with other settings."""
    import torch.distributed as dist

    import ds_lowrank

    engine = ds_lowrank.initialize(model=make_model(), config=settings)[0]
    for step in range(3):
        train_step(engine, step)
    engine.save_checkpoint(directory, tag="here")
    dist.barrier()
    engine = ds_lowrank.initialize(model=make_model(), config=later)[0]
    engine.load_checkpoint(directory, tag="here")
    for step in range(3, STEPS):
        train_step(engine, step)
    return full_weights(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_may_be_resumed_with_offload_or_without(stage, tmp_path):
    plain, cpu = config(stage, 2), offloaded(stage)
    expected = run_ranks(2, run_engine, plain, STEPS)[0]["last"]
    for number, (before, after) in enumerate([(plain, cpu), (cpu, plain)]):
        for weights in run_ranks(2, save_and_continue, before, after, str(tmp_path / str(number))):
            assert equal(weights, expected)


def run_grid_of_nccl(grid, settings, steps):
    """``run_grid`` where the groups say that they take no tensors on the CPU; also how many more groups were made."""
    import torch.distributed as dist

    from ds_lowrank.placement.grid import ranks_of

    made, new_group, config_of = [], dist.new_group, dist.get_backend_config

    def recorded(ranks=None, *args, **named):
        group = new_group(ranks, *args, **named)
        if named.get("backend") == "gloo":
            made.append((ranks, group))
        return group

    dist.new_group = recorded
    dist.get_backend_config = lambda group=None: "cuda:nccl" if group not in [g for _, g in made] else config_of(group)
    result = grids.run_grid(grid, settings, steps)
    (own,) = [group for ranks, group in made if dist.get_rank() in ranks]
    return result | {"groups": [ranks for ranks, _ in made], "own": ranks_of(own)}


@pytest.mark.parametrize("method", ["GaLore", "Lorenza"])
@pytest.mark.parametrize(
    ("grid", "groups"),
    [
        (grids.Grid(2, 2, 1, 2), [[0, 1, 2, 3]]),
        (grids.Grid(2, 2, 1, 3, "autotp"), [[0, 1, 2, 3]]),
        (grids.Grid(2, 1, 2, 1), [[0, 1], [2, 3]]),
    ],
    ids=str,
)
def test_grids_sum_on_the_cpu_over_groups_of_their_own(grid, groups, method):
    settings = grids.settings_of(grid, gas=2, clip=0.5, method=method, zero_optimization=CPU)
    (first, last), norms = grids.oracle(method, 0.5, STEPS)
    results = run_ranks(4, run_grid_of_nccl, grid, settings, STEPS)
    for result in results:
        assert result["groups"] == groups
        assert result["own"] in groups
        assert result["norms"] == pytest.approx(norms, rel=1e-4)
    assert max_relative_difference(results[0]["weights"][0], first) < 1e-5
    assert max_relative_difference(results[0]["weights"][1], last) < 1e-4


@pytest.mark.parametrize(
    ("stage", "zero", "more", "message"),
    [
        (0, CPU, {}, "offload_optimizer at stage 0 is not supported with GaLore: remove it, or set"),
        (
            3,
            {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}},
            {},
            "device = nvme is not .*: set it to cpu",
        ),
        (3, {"offload_optimizer": {"device": "cpu", "ratio": 0.3}}, {}, "ratio below 1 is not .*: remove it"),
        (3, {"offload_optimizer": {"device": "cpu", "super_offload": True}}, {}, "super_offload is not .*: remove it"),
        (2, {**CPU, "zenflow": {"topk_ratio": 0.1}}, {}, "zenflow is not .*: remove it"),
        (2, {"offload_optimizer": {"device": "cpu", "pin_memory": "yes"}}, {}, "pin_memory"),
        (2, {"offload_optimizer": {"device": "disk"}}, {}, "offload_optimizer.device"),
        (2, {"cpu_offload": True}, {}, 'cpu_offload is not .*: write "offload_optimizer"'),
        (2, CPU, {"zero_force_ds_cpu_optimizer": True}, "asks for DeepSpeed's CPU Adam in the place of GaLore: remove"),
    ],
    ids=str,
)
def test_what_cannot_be_offloaded_is_refused_on_every_rank_in_one_line(stage, zero, more, message):
    for error in run_ranks(2, broken, config(stage, 2, zero_optimization=zero, **more)):
        assert re.search(message, error), error
        assert len(error.removeprefix("the DeepSpeed configuration has unsupported settings:\n").splitlines()) == 1


def step_of_stock_engine(settings):
    """The error of the first step of an engine that DeepSpeed's own function has built."""
    import deepspeed

    import ds_lowrank

    model = make_model()
    ds_lowrank.tag_parameters(model)
    optimizer = ds_lowrank.GaLore(model.named_parameters(), **settings.pop("optimizer")["params"])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    batch = tokens(0)[:4]
    engine.backward(engine(input_ids=batch, labels=batch).loss)
    try:
        engine.step()
    except ds_lowrank.ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_of_deepspeeds_own_initialize_is_refused(stage):
    more = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    for error in run_ranks(2, step_of_stock_engine, offloaded(stage, **more)):
        assert "Call ds_lowrank.initialize" in error
