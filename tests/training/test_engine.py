"""The parts of a step that differ by DeepSpeed's wrapper, on two ranks with real engines."""

import time
from typing import Any

import pytest
import torch

from ds_lowrank.data.batches import ValidationBatch
from ds_lowrank.models.llama import build
from ds_lowrank.training.evaluation import evaluate
from ds_lowrank.training.loop import mean_over_ranks, train_step
from ds_lowrank.training.param_groups import matrix_groups
from tests.engines.pool import run_ranks
from tests.training.runs import MODEL, OPTIMIZERS, deepspeed_config

TOKENS = torch.arange(8 * 16, dtype=torch.int64).reshape(8, 16) * 7 % MODEL["vocab_size"]


def model_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**MODEL, use_cache=False)


def dense_step() -> tuple[float, float]:
    """Loss and gradient norm of one process on the whole batch."""
    model = build(model_config(), 0)
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


def _engine(zero_stage: int, clipping: float, bf16: bool) -> Any:
    import deepspeed

    config = deepspeed_config("AdamW", zero_stage, gradient_clipping=clipping, bf16={"enabled": bf16})
    engine, *_ = deepspeed.initialize(model=build(model_config(), 0, config), config=config)
    return engine


def _measured_step(zero_stage: int, clipping: float, bf16: bool) -> tuple[float, float | None]:
    engine = _engine(zero_stage, clipping, bf16)
    own = TOKENS[4 * engine.global_rank :][:4]
    result = train_step(engine, [{"input_ids": part, "labels": part} for part in own.split(2)], measure=True)
    assert min(result.forward_seconds, result.backward_seconds, result.step_seconds) > 0
    return mean_over_ranks(result.loss), result.grad_norm


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("clipping", "bf16"), [(0.0, False), (0.1, False), (0.1, True)])
def test_loss_and_raw_gradient_norm_are_those_of_the_whole_batch(zero_stage, clipping, bf16):
    loss, norm = dense_step()
    # fp32 differs by the order of sums; bf16 keeps eight bits of each activation and gradient.
    tolerance = 2e-2 if bf16 else 1e-5
    for measured in run_ranks(2, _measured_step, zero_stage, clipping, bf16):
        assert measured == pytest.approx((loss, norm), rel=tolerance)


def _slow_reduction(zero_stage: int, measure: bool) -> tuple[Any, list[str]]:
    """A step of two micro-batches, after each of which the reduction takes a tenth of a second longer."""
    engine = _engine(zero_stage, 0.0, False)
    reduce = engine.allreduce_gradients

    def slow() -> None:
        time.sleep(0.1)
        reduce()

    engine.allreduce_gradients = slow
    own = TOKENS[4 * engine.global_rank :][:4]
    result = train_step(engine, [{"input_ids": part, "labels": part} for part in own.split(2)], measure)
    return result, engine.engine_timers.backward_reduce_timers


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_reduction_is_timed_within_the_backward_pass_of_a_logged_step(zero_stage):
    for result, timers in run_ranks(2, _slow_reduction, zero_stage, True):
        assert 0.2 <= result.reduce_seconds < result.backward_seconds
        assert timers == []
    for result, timers in run_ranks(2, _slow_reduction, zero_stage, False):
        assert result.reduce_seconds is None and timers == []


def _uneven_evaluation(zero_stage: int) -> tuple[float, bool]:
    engine = _engine(zero_stage, 0.0, False)
    shares = [[TOKENS[:2], TOKENS[2:4], TOKENS[4:5]], [TOKENS[5:7]]]
    own = [ValidationBatch(tokens, len(tokens)) for tokens in shares[engine.global_rank]]
    own += [ValidationBatch(TOKENS[:1], 0)] * (3 - len(own))
    return evaluate(engine, own), engine.training


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_evaluation_weights_every_sequence_once(zero_stage):
    with torch.no_grad():
        expected = build(model_config(), 0)(input_ids=TOKENS[:7], labels=TOKENS[:7]).loss.item()
    for loss, training in run_ranks(2, _uneven_evaluation, zero_stage):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert training


def test_matrices_get_their_own_learning_rate():
    model = build(model_config(), 0)
    rest, matrices = matrix_groups(model, OPTIMIZERS["AdamW"], 0.25)
    assert (rest["lr"], matrices["lr"]) == (0.01, 0.0025)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)].split(".")[-2] for parameter in matrices["params"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert len(matrices["params"]) == 14
    assert len(rest["params"]) + 14 == len(names)
    assert matrix_groups(model, {"type": "VLoRP", "params": {"lr": 0.01}}, 0.5)[1]["lr"] == 0.005
    with pytest.raises(ValueError, match=r"--matrix-lr-scale is not for GaLore: set optimizer.params.scale"):
        matrix_groups(model, OPTIMIZERS["GaLore"], 0.25)
