"""State under DeepSpeed: its size, its life through a checkpoint, and what a bad gradient does to it."""

from __future__ import annotations

import pytest
import torch

from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, Oracle, config, full_weights, make_model, run_engine, train_step, worst

LARGE = {"hidden": 160, "intermediate": 431}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_moments_and_bases_over_all_ranks_are_those_of_one_process(stage, world):
    settings = config(stage, world, params={"rank": 32})
    results = run_ranks(world, run_engine, settings, 1, False, LARGE)
    projected = sum(result["bytes"][0] for result in results)
    elementwise = sum(result["bytes"][1] for result in results)
    h, i, layers = LARGE["hidden"], LARGE["intermediate"], 2
    # rank * (2 * kept + compressed) elements of four bytes for each matrix: q, k, v, o and gate, up, down.
    one_process = 4 * layers * 32 * (4 * (2 * h + h) + 3 * (2 * i + h))
    assert projected == one_process
    assert elementwise == 4 * 2 * (2 * 131 * h + (2 * layers + 1) * h)
    assert max(result["bytes"][0] for result in results) < one_process


def test_stage_0_replicates_as_zero_0_does():
    results = run_ranks(2, run_engine, config(0, 2, params={"rank": 32}), 1, False, LARGE)
    assert results[0]["bytes"] == results[1]["bytes"]


def poison(engine, step):
    """An ordinary step whose gradients contain one NaN on the last rank."""
    import torch.distributed as dist

    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[3] = float("nan")
        return gradient

    handle = None
    if dist.get_rank() == dist.get_world_size() - 1:
        handle = engine.module.model.layers[1].mlp.down_proj.register_full_backward_hook(
            lambda module, inputs, outputs: tuple(spoil(g) if g is not None else None for g in inputs)
        )
    train_step(engine, step)
    if handle is not None:
        handle.remove()


def train_with_a_nan(settings, steps, bad):
    import ds_lowrank

    model = make_model()
    engine, *_ = ds_lowrank.initialize(model=model, config=settings)
    optimizer = engine.basic_optimizer
    for step in range(steps):
        before = full_weights(engine)
        steps_before = [slot.state["step"] for slot in optimizer.slots]
        (poison if step == bad else train_step)(engine, step)
        if step == bad:
            assert worst(full_weights(engine), before) == 0
            assert [slot.state["step"] for slot in optimizer.slots] == steps_before
    assert all(t.isfinite().all() for s in optimizer.slots for t in s.state.values() if isinstance(t, torch.Tensor))
    return {"weights": full_weights(engine), "skipped": engine.skipped_steps + optimizer.skipped_updates}


@pytest.mark.parametrize("bad", [0, 2, 4])
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32")])
def test_a_nan_gradient_is_skipped_and_counted(stage, dtype, bad):
    """Training goes on as if the batch had not been there: also at a refresh (steps 0 and 4)."""
    oracle = Oracle()
    for step in range(7):
        if step != bad:
            oracle.step(step)
    for result in run_ranks(2, train_with_a_nan, config(stage, 2, dtype), 7, bad):
        assert result["skipped"] == 1
        assert worst(result["weights"], oracle.weights()) < 1e-4


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (2, "bf16"), (1, "bf16_fp32_accumulation"), (3, "bf16")])
def test_a_nan_gradient_is_skipped_in_every_bf16_wrapper(stage, dtype):
    for result in run_ranks(2, train_with_a_nan, config(stage, 2, dtype), 5, 2):
        assert result["skipped"] == 1


def resume(settings, directory, interrupt, steps):
    """Train ``steps`` steps; with ``interrupt``, save there and go on in a new engine."""
    import torch.distributed as dist

    import ds_lowrank

    def engine_of():
        return ds_lowrank.initialize(model=make_model(), config=settings)[0]

    engine = engine_of()
    for step in range(steps):
        if step == interrupt:
            engine.save_checkpoint(directory, tag="here")
            dist.barrier()
            torch.manual_seed(99)
            engine = engine_of()
            engine.load_checkpoint(directory, tag="here")
        train_step(engine, step)
    return full_weights(engine)


LAYOUTS = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (1, "bf16_fp32_accumulation"), (3, "fp32"), (3, "bf16")]


@pytest.mark.parametrize(("stage", "dtype"), LAYOUTS)
@pytest.mark.parametrize("interrupt", [3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(stage, dtype, interrupt, tmp_path):
    settings = config(stage, 2, dtype, params={"moments": "rotate", "stagger": True})
    through = run_ranks(2, resume, settings, str(tmp_path), None, 7)
    resumed = run_ranks(2, resume, settings, str(tmp_path), interrupt, 7)
    for a, b in zip(through, resumed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"GaLore"}))
@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_every_method_resumes_bit_for_bit(stage, dtype, method, tmp_path):
    """Saved in the middle of an interval; AdaRankGrad's ranks by then are not those it starts with."""
    settings = config(stage, 2, dtype, method=method)
    through = run_ranks(2, resume, settings, str(tmp_path), None, 7)
    resumed = run_ranks(2, resume, settings, str(tmp_path), 5, 7)
    for a, b in zip(through, resumed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"GaLore"}))
@pytest.mark.parametrize(("stage", "bad"), [(0, 0), (2, 4), (3, 2)])
def test_every_method_skips_a_nan_gradient(stage, bad, method):
    oracle = Oracle(method=method)
    for step in range(6):
        if step != bad:
            oracle.step(step)
    for result in run_ranks(2, train_with_a_nan, config(stage, 2, method=method), 6, bad):
        assert result["skipped"] == 1
        assert worst(result["weights"], oracle.weights()) < 1e-4


def save_only(settings, directory, model_options):
    import ds_lowrank

    engine, *_ = ds_lowrank.initialize(model=make_model(**model_options), config=settings)
    train_step(engine, 0)
    engine.save_checkpoint(directory, tag="here")


def load_only(settings, directory):
    import ds_lowrank
    from ds_lowrank import CheckpointError

    engine, *_ = ds_lowrank.initialize(model=make_model(), config=settings)
    before = full_weights(engine)
    states = [slot.state["exp_avg"].clone() for slot in engine.basic_optimizer.slots]
    try:
        engine.load_checkpoint(directory, tag="here")
    except CheckpointError as error:
        after = [slot.state["exp_avg"] for slot in engine.basic_optimizer.slots]
        assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))
        return str(error), before
    return "", before


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"params": {"rank": 7}}, r"exp_avg is .*rank and state_dtype that saved it|basis is .*rank"),
        ({"params": {"proj_type": "left"}}, r"side is left in the checkpoint and right in this run"),
        ({"params": {"state_dtype": "bf16"}}, r"bfloat16 in the checkpoint.*state_dtype"),
        ({"params": {"inner": "lion"}}, r"the checkpoint holds \['basis', 'exp_avg', 'step'\], this run needs"),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, r"not saved by ds_lowrank"),
    ],
    ids=["rank", "side", "dtype", "inner", "method"],
)
def test_a_foreign_checkpoint_is_refused_on_every_rank_and_changes_nothing(stage, saved, message, tmp_path):
    if "optimizer" in saved:
        settings = config(stage, 2)
        settings["optimizer"] = saved["optimizer"]
    else:
        settings = config(stage, 2, **saved)
    run_ranks(2, save_only, settings, str(tmp_path), {})
    for error, _ in run_ranks(2, load_only, config(stage, 2), str(tmp_path)):
        assert __import__("re").search(message, error), error


def test_a_rank_that_the_run_does_not_allow_is_refused(tmp_path):
    settings = config(2, 2, method="AdaRankGrad", params={"residual_tol": 0.01})
    run_ranks(2, save_only, settings, str(tmp_path), {})
    smaller = config(2, 2, method="AdaRankGrad", params={"rank_max": 3})
    for error, _ in run_ranks(2, load_only, smaller, str(tmp_path)):
        assert "this run allows 3: raise rank_max" in error


def broken(settings):
    import ds_lowrank

    try:
        ds_lowrank.initialize(model=make_model(), config=settings)
    except ds_lowrank.ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": {"rnak": 4}}, "unknown key; did you mean 'rank'"),
        ({"params": {"rank": 0}}, "greater than 0"),
        ({"params": {"rank": -3}}, "greater than 0"),
        ({"params": {"rank": 2.5}}, "valid integer"),
        ({"params": {"momentum": 0.9}}, "momentum belongs to inner 'sgd', inner is 'adamw'"),
        ({"method": "AdaRankGrad", "params": {"rank_min": 9}}, "rank_min 9 is above rank_max 6"),
        ({"method": "AdaRankGrad", "params": {"residual_tol": 1.0}}, "less than 1"),
        (
            {"method": "VLoRP", "params": {"granularity": 3}},
            "40 x 40: granularity 3 does not fit; p/q does for p in {1, 2, 4, 5, 8, 10, 20, 40} and q in {1, 2, 4",
        ),
        ({"params": {"target_modules": ["*nothing*"]}}, "matches no parameter"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer is not supported"),
        ({"amp": {"enabled": True}}, "use bf16 or fp16"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor parallelism is not supported yet"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_configuration_stops_at_start_on_every_rank(changes, message):
    for error in run_ranks(2, broken, config(2, 2, **changes)):
        assert message in error


def test_a_misspelt_method_names_the_nearest():
    settings = config(2, 2)
    settings["optimizer"]["type"] = "Galore"
    for error in run_ranks(2, broken, settings):
        assert "did you mean 'GaLore'" in error


def test_a_rank_above_the_smaller_dimension_is_clipped_and_said():
    (table,) = run_ranks(1, table_of, config(0, 1, params={"rank": 400}))
    assert "40 (clipped from 400)" in table
    assert "14 of 21 parameters are projected" in table


def table_of(settings):
    import ds_lowrank
    from ds_lowrank.report import role_table, state_bytes

    engine, *_ = ds_lowrank.initialize(model=make_model(), config=settings)
    slots = engine.basic_optimizer.slots
    return role_table(slots, state_bytes(slots), 1)
