"""LORENZA, which evaluates the loss around the weights, in the Trainer: by a mixin; without it an error says so."""

from __future__ import annotations

import pytest

from tests.engines.pool import run_ranks
from tests.engines.scenario import make_model
from tests.huggingface.scenario import (
    STEPS,
    Rows,
    arguments,
    hf_config,
    max_difference,
    own_config,
    train_with_own_engine,
)

pytestmark = pytest.mark.slow


def lorenza_config(stage, accumulation):
    return hf_config(stage, "Lorenza", accumulation=accumulation)


def train(folder, stage, gas, accumulation, mixin=True, rows=STEPS, **options):
    import torch.distributed as dist
    from transformers import Trainer

    import ds_lowrank
    from tests.engines.scenario import full_weights

    class LorenzaTrainer(*([ds_lowrank.ForwardBackwardMixin] if mixin else []), Trainer):
        pass

    ds_lowrank.register()
    config = lorenza_config(stage, accumulation)
    own = arguments(folder, stage, dist.get_world_size(), gas, deepspeed=config, **options)
    trainer = LorenzaTrainer(model=make_model(), args=own, train_dataset=Rows(rows))
    trainer.train()
    return full_weights(trainer.model_wrapped), [r["loss"] for r in trainer.state.log_history if "loss" in r]


@pytest.mark.parametrize(
    ("stage", "gas", "accumulation"), [(1, 1, "per_step"), (2, 2, "per_step"), (3, 2, "per_micro_batch")]
)
def test_the_mixin_takes_the_steps_of_our_own_engine(tmp_path, stage, gas, accumulation):
    config = own_config(stage, 2, gas, method="Lorenza")
    config["optimizer"]["params"]["accumulation"] = accumulation
    config["optimizer"]["params"].setdefault("eps", 1e-8)
    results = run_ranks(2, train, tmp_path, stage, gas, accumulation, adam_epsilon=config["optimizer"]["params"]["eps"])
    own = run_ranks(2, train_with_own_engine, config, gas)
    # The Trainer divides a sum by the number of all labels, the engine averages means: the last bit may differ, and
    # with it a direction's coefficient, a difference of losses over a small radius.
    assert max_difference(results[0][0], own[0]["weights"]) < 1e-5
    assert results[0][1][0] == pytest.approx(sum(sum(r["losses"][:gas]) for r in own) / (2 * gas), rel=1e-5)


def test_without_the_mixin_the_first_step_says_what_is_missing(tmp_path):
    with pytest.raises(AssertionError, match=r"rank 0: .*(?s:.)*ForwardBackwardMixin(?s:.)*rank 1: "):
        run_ranks(2, train, tmp_path, 2, 1, "per_step", False)


def test_an_epoch_that_ends_within_a_step_is_refused_at_the_first_step(tmp_path):
    with pytest.raises(AssertionError, match=r"of 3 micro-batches on each rank, but an epoch has 10"):
        run_ranks(1, train, tmp_path, 2, 3, "per_step", True, 10, per_device_train_batch_size=24)
