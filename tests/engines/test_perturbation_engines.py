"""LORENZA's ascent under real engines: it restores every bit, and the gradient is that of the perturbed weights."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.reference.lorenza import climb
from tests.engines.pool import run_ranks
from tests.engines.scenario import (
    BATCH,
    Oracle,
    config,
    full_weights,
    make_model,
    make_model_for,
    max_relative_difference,
    run_engine,
    tokens,
)

STEPS = 4


def lorenza_config(stage, world, dtype="fp32", gas=1, **changes):
    return config(stage, world, dtype, gas, method="Lorenza", **changes)


def forwards_of(engine, step):
    import torch.distributed as dist

    mine = tokens(step).chunk(dist.get_world_size())[dist.get_rank()]
    micros = mine.chunk(engine.gradient_accumulation_steps())
    return [lambda micro=micro: engine(input_ids=micro, labels=micro).loss for micro in micros]


def model_weights(engine):
    """The weights that forward passes use, in the model's dtype."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def restores_weights(settings, zero_init=False):
    """Train at a learning rate of zero.

    Returns:
        For each step, whether ascent and step left every bit of the weights, and the perturbation's norm.
    """
    import ds_lowrank

    model = make_model_for(settings, zero_init)
    engine, *_ = ds_lowrank.initialize(model=model, config=settings)
    same, norms = [], []
    for step in range(3):
        before = model_weights(engine)
        ds_lowrank.forward_backward(engine, forwards_of(engine, step))
        between = model_weights(engine)
        engine.step()
        after = model_weights(engine)
        same.append(all(torch.equal(before[name], other[name]) for other in (between, after) for name in before))
        norms.append(engine.basic_optimizer.metrics()["lowrank/perturbation_norm"])
    return same, norms


CASES = [
    *((stage, dtype, {}, False) for stage in range(4) for dtype in ("fp32", "bf16")),
    (2, "bf16_fp32_accumulation", {}, False),
    (3, "fp32", {"stage3_param_persistence_threshold": 0}, False),
    (3, "bf16", {"stage3_param_persistence_threshold": 0}, True),
]


@pytest.mark.parametrize(("stage", "dtype", "zero", "zero_init"), CASES, ids=str)
def test_a_learning_rate_of_zero_restores_every_bit_on_every_stage(stage, dtype, zero, zero_init):
    settings = lorenza_config(stage, 2, dtype, gas=2, params={"lr": 0.0}, zero_optimization=zero)
    for same, norms in run_ranks(2, restores_weights, settings, zero_init):
        assert all(same)
        assert norms[0] == 0, "there was no subspace before the first step"
        # bf16 keeps eight bits of a move that is a tenth of the weights.
        assert norms[1:] == pytest.approx([0.5] * 2, rel=1e-5 if dtype == "fp32" else 0.05)


@pytest.mark.parametrize("params", [{"rank": None, "probe_form": "gaussian"}, {"probe_form": "gaussian"}], ids=str)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_full_rank_and_gaussian_directions_step_as_the_dense_oracle(stage, params):
    """A Gaussian direction is long, so the same distance needs a smaller radius.

    A slope is a difference of losses, accurate to 1e-4, and it decides where the gradient is taken. Full-rank Adam at
    its usual epsilon would reduce every element of that gradient, however small, to its sign.
    """
    params = {**params, "probe_radius": 0.02, "norm": "per_matrix", "perturbation_radius": 0.1, "eps": 1e-2}
    zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    results = run_ranks(2, run_engine, lorenza_config(stage, 2, gas=2, params=params, zero_optimization=zero), STEPS)
    oracle = Oracle(method="Lorenza", **params)
    oracle.step(0)
    first = oracle.weights()
    for step in range(1, STEPS):
        oracle.step(step)
    for result in results:
        assert max_relative_difference(result["first"], first) < 1e-5
        assert max_relative_difference(result["last"], oracle.weights()) < 1e-4


class PerMicroBatchOracle(Oracle):
    """The oracle that perturbs the weights anew for every micro-batch of a step."""

    def gradients(self, step, world=2, gas=2):
        micros = [part.chunk(gas) for part in tokens(step).chunk(world)]
        rules = [rule for rule in self.rules.values() if hasattr(rule, "direction") and hasattr(rule, "gap")]
        found = {}
        for number in range(gas):
            batch = torch.cat([part[number] for part in micros])
            saved = [rule.weight.clone() for rule in rules]
            with torch.no_grad():
                climb(rules, lambda batch=batch: self.loss(batch), self.t, number, **self.options)
            self.model.zero_grad()
            self.loss(batch).backward()
            for rule, weight in zip(rules, saved, strict=True):
                rule.weight.copy_(weight)
            for name, parameter in self.model.named_parameters():
                found[name] = found.get(name, 0) + parameter.grad / gas
        return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_perturbation_per_micro_batch_steps_as_the_dense_oracle(stage):
    settings = lorenza_config(stage, 2, gas=2, params={"accumulation": "per_micro_batch"})
    results = run_ranks(2, run_engine, settings, STEPS)
    oracle = PerMicroBatchOracle(method="Lorenza")
    for step in range(STEPS):
        oracle.step(step)
    for result in results:
        assert max_relative_difference(result["last"], oracle.weights()) < 1e-4


def messages_of_bad_calls(settings):
    """Make calls that must be refused, check that each leaves the weights alone, and return the messages."""
    import torch.distributed as dist

    import ds_lowrank

    engine, *_ = ds_lowrank.initialize(model=make_model(), config=settings)
    messages = []

    def attempt(forwards):
        before = full_weights(engine)
        try:
            ds_lowrank.forward_backward(engine, forwards)
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
        after = full_weights(engine)
        assert all(torch.equal(before[name], after[name]) for name in before)

    attempt(forwards_of(engine, 0)[:1])
    attempt(forwards_of(engine, 0) * 2)
    attempt([])
    ds_lowrank.forward_backward(engine, forwards_of(engine, 0))
    engine.step()

    def broken():
        if dist.get_rank() == 1:
            raise ValueError("no such batch")
        return forwards_of(engine, 1)[0]()

    attempt([broken, broken])
    return messages


@pytest.mark.parametrize("stage", [0, 2])
def test_every_rank_refuses_bad_calls_without_hanging(stage):
    one, two = run_ranks(2, messages_of_bad_calls, lorenza_config(stage, 2, gas=2))
    assert one[0] == two[0] and "needs all 2 micro-batches of a step in one call" in one[0]
    for text, count in ((one[1], 4), (one[2], 0)):
        assert f"got {count} micro-batches, and this step has 2 left of gradient_accumulation_steps 2" in text
    assert one[3].startswith("RemoteError: a probe's forward pass failed on rank 1")
    assert two[3] == "ValueError: no such batch"


def step_without_the_ascent(settings):
    import ds_lowrank

    engine, *_ = ds_lowrank.initialize(model=make_model(), config=settings)
    loss = engine(input_ids=tokens(0)[: BATCH // 2], labels=tokens(0)[: BATCH // 2]).loss
    engine.backward(loss)
    try:
        engine.step()
    except RuntimeError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_wrapper_refuses_a_step_without_the_ascent(stage, dtype):
    for text in run_ranks(2, step_without_the_ascent, lorenza_config(stage, 2, dtype)):
        assert "call ds_lowrank.forward_backward" in text
