"""State under DeepSpeed: its size, its life through a checkpoint, and what a bad gradient does to it."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch

from tests.engines.pool import run_ranks
from tests.engines.scenario import (
    METHODS,
    Oracle,
    config,
    full_weights,
    make_model,
    max_relative_difference,
    run_engine,
    train_step,
)
from tests.unit.pages import state_rows

LARGE = {"hidden": 160, "intermediate": 431}


def bytes_in_one_process():
    """Of projected matrices, by the documented formula, and of AdamW's two moments for everything else."""
    (formula,) = (text for method, options, text in state_rows() if (method, options) == ("GaLore", {}))
    h, i, layers = LARGE["hidden"], LARGE["intermediate"], 2
    square, oblong = (eval(formula, {"r": 32, "D": D, "d": h}) for D in (h, i))  # q, k, v, o and gate, up, down
    return 4 * layers * (4 * square + 3 * oblong), 4 * 2 * (2 * 131 * h + (2 * layers + 1) * h)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_over_all_ranks_is_that_of_one_process(stage, world):
    results = run_ranks(world, run_engine, config(stage, world, params={"rank": 32}), 1, False, LARGE)
    projected, elementwise = (sum(found) for found in zip(*(result["bytes"] for result in results), strict=True))
    assert (projected, elementwise) == bytes_in_one_process()
    assert max(result["bytes"][0] for result in results) < projected


def test_stage_0_stores_all_state_on_every_rank():
    for result in run_ranks(2, run_engine, config(0, 2, params={"rank": 32}), 1, False, LARGE):
        assert tuple(result["bytes"]) == bytes_in_one_process()


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
            assert max_relative_difference(full_weights(engine), before) == 0
            assert [slot.state["step"] for slot in optimizer.slots] == steps_before
    assert all(t.isfinite().all() for s in optimizer.slots for t in s.state.values() if isinstance(t, torch.Tensor))
    return {"weights": full_weights(engine), "skipped": engine.skipped_steps + optimizer.skipped_updates}


@pytest.mark.parametrize("bad", [0, 2, 4])
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32")])
def test_nan_gradient_is_skipped_and_counted(stage, dtype, bad):
    """Training continues as if the batch had not been there, also at a refresh (steps 0 and 4)."""
    oracle = Oracle()
    for step in range(7):
        if step != bad:
            oracle.step(step)
    for result in run_ranks(2, train_with_a_nan, config(stage, 2, dtype), 7, bad):
        assert result["skipped"] == 1
        assert max_relative_difference(result["weights"], oracle.weights()) < 1e-4


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (2, "bf16"), (1, "bf16_fp32_accumulation"), (3, "bf16")])
def test_nan_gradient_is_skipped_in_every_bf16_wrapper(stage, dtype):
    for result in run_ranks(2, train_with_a_nan, config(stage, 2, dtype), 5, 2):
        assert result["skipped"] == 1


def resume(settings, directory, interrupt, steps):
    """Train for ``steps`` steps; with ``interrupt``, save there and continue in a new engine."""
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


ROTATED = {"moments": "rotate", "stagger": True}


@functools.cache
def uninterrupted(stage, dtype):
    return run_ranks(2, resume, config(stage, 2, dtype, params=ROTATED), "", None, 7)


@pytest.mark.parametrize(("stage", "dtype"), LAYOUTS)
@pytest.mark.parametrize("interrupt", [3, 4])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(stage, dtype, interrupt, tmp_path):
    resumed = run_ranks(2, resume, config(stage, 2, dtype, params=ROTATED), str(tmp_path), interrupt, 7)
    for a, b in zip(uninterrupted(stage, dtype), resumed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"GaLore"}))
@pytest.mark.parametrize(
    ("stage", "dtype", "state_dtype"),
    [(0, "bf16", "fp32"), (1, "bf16_fp32_accumulation", "int8"), (2, "fp32", "bf16"), (3, "bf16", "int8")],
)
def test_every_method_resumes_bit_for_bit(stage, dtype, state_dtype, method, tmp_path):
    """Saved in the middle of an interval, when AdaRankGrad's ranks are no longer those of the start."""
    settings = config(stage, 2, dtype, method=method, params={"state_dtype": state_dtype})
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
        assert max_relative_difference(result["weights"], oracle.weights()) < 1e-4


def save_only(settings, directory, model_options):
    import ds_lowrank

    engine, *_ = ds_lowrank.initialize(model=make_model(**model_options), config=settings)
    train_step(engine, 0)
    engine.save_checkpoint(directory, tag="here")


def save_layout(stage, dtype, directory):
    """Save DeepSpeed's own files, as an engine of its own ``initialize`` does."""
    import ds_lowrank

    engine, *_ = ds_lowrank.initialize(model=make_model(), config=config(stage, 2, dtype))
    train_step(engine, 0)
    type(engine).save_checkpoint(engine, directory, tag="here")


def load_layout(stage, ranks, dtype, directory):
    return load_only(config(stage, ranks, dtype), directory)


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (
            (3, "fp32"),
            (3, 1, "fp32"),
            "ZeRO 3 in fp32 or fp16, 2 data-parallel by 1 .*; this run has ZeRO 3 .*, 1 data",
        ),
        (
            (2, "fp32"),
            (2, 1, "fp32"),
            "ZeRO 1 or 2 .*, 2 data-parallel by 1 .*; this run has ZeRO 1 or 2 .*, 1 data-par",
        ),
        ((2, "fp32"), (3, 2, "fp32"), "ZeRO 1 or 2 in .*; this run has ZeRO 3 in"),
        ((3, "fp32"), (2, 2, "fp32"), "ZeRO 3 in .*; this run has ZeRO 1 or 2 in"),
        ((0, "fp32"), (1, 2, "fp32"), "ZeRO 0, 1 model-parallel ranks; this run has ZeRO 1 or 2"),
        ((1, "fp32"), (0, 2, "fp32"), "ZeRO 1 or 2 in fp32 or fp16, .*; this run has ZeRO 0"),
        ((2, "bf16"), (2, 2, "fp32"), "ZeRO 1 or 2 in bf16, .*; this run has ZeRO 1 or 2 in fp32 or fp16"),
    ],
)
def test_deepspeeds_own_files_of_another_layout_are_refused_in_one_sentence(saved, loaded, message, tmp_path):
    run_ranks(2, save_layout, *saved, str(tmp_path))
    for found in run_ranks(loaded[1], load_layout, *loaded, str(tmp_path)):
        assert re.search(rf"here was saved with {message}", found), found
        assert "Resume with the ZeRO stage, precision and grid of ranks" in found


def load_only(settings, directory):
    """Load a checkpoint that does not fit: the message, after checking that neither state nor groups changed."""
    import ds_lowrank
    from ds_lowrank import CheckpointError

    engine, *_ = ds_lowrank.initialize(model=make_model(), config=settings)
    train_step(engine, 0)
    optimizer = engine.basic_optimizer
    before = copy.deepcopy(optimizer.state_dict())
    try:
        engine.load_checkpoint(directory, tag="here")
    except CheckpointError as error:
        after = optimizer.state_dict()
        assert after["counts"] == before["counts"] and after["param_groups"] == before["param_groups"]
        for name, state in before["state"].items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][name][key]))
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"params": {"rank": 7}}, r"^rank is 7 in the checkpoint and 4 in this run"),
        ({"params": {"proj_type": "left"}}, r"^proj_type is 'left' in the checkpoint and 'std' in this run"),
        ({"params": {"inner": "lion"}}, r"^inner is 'lion' in the checkpoint and 'adamw' in this run"),
        ({"params": {"exclude_modules": ["q_proj"]}}, r"q_proj.weight is projected in this run and was not projected"),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, r"not saved by ds_lowrank"),
    ],
    ids=["rank", "side", "inner", "role", "method"],
)
def test_foreign_checkpoint_is_refused_on_every_rank_unchanged(stage, saved, message, tmp_path):
    if "optimizer" in saved:
        settings = config(stage, 2)
        settings["optimizer"] = saved["optimizer"]
    else:
        settings = config(stage, 2, **saved)
    run_ranks(2, save_only, settings, str(tmp_path), {})
    for error in run_ranks(2, load_only, config(stage, 2), str(tmp_path)):
        assert re.search(message, error), error


@pytest.mark.parametrize(
    ("method", "saved", "message"),
    [
        ("AdaRankGrad", {"rank_max": 3}, "rank_max is 3 in the checkpoint and 6 in this run"),
        ("VLoRP", {"rank": 1, "granularity": 10}, "rank is 1 in the checkpoint and 2 in this run"),
        ("OnlineSubspaceDescent", {"basis_optimizer": "sgd"}, "basis_optimizer is 'sgd' in the checkpoint and 'adam'"),
        ("Apollo", {"rank": 3}, "rank is 3 in the checkpoint and 4 in this run"),
    ],
)
def test_state_of_other_options_is_refused(method, saved, message, tmp_path):
    """VLoRP's tensors have the same shapes at 2 x 5 and 1 x 10, but other meanings."""
    run_ranks(2, save_only, config(2, 2, method=method, params=saved), str(tmp_path), {})
    for error in run_ranks(2, load_only, config(2, 2, method=method), str(tmp_path)):
        assert message in error


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
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param is not supported"),
        ({"amp": {"enabled": True}}, "use bf16 or fp16"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_configuration_stops_every_rank_at_start(changes, message):
    for error in run_ranks(2, broken, config(2, 2, **changes)):
        assert message in error


def test_misspelt_method_is_refused_with_the_nearest_name():
    settings = config(2, 2)
    settings["optimizer"]["type"] = "Galore"
    for error in run_ranks(2, broken, settings):
        assert "did you mean 'GaLore'" in error


def test_rank_above_the_smaller_dimension_is_clipped_and_reported():
    (table,) = run_ranks(1, table_of, config(0, 1, params={"rank": 400}))
    assert "40 (clipped from 400)" in table
    assert "14 of 21 parameters are projected" in table


def table_of(settings):
    import ds_lowrank
    from ds_lowrank.optimizer.report import role_table, state_bytes, take_inventory

    engine, *_ = ds_lowrank.initialize(model=make_model(), config=settings)
    slots = engine.basic_optimizer.slots
    return role_table([take_inventory(slots, [])], state_bytes(slots), 1)


def test_every_rank_counts_the_rows_of_a_basis_that_it_would_gather():
    """At ZeRO 3 each of two ranks has half of the rows of a matrix: all of its columns."""
    settings = config(3, 2, params={"rank": 4, "basis_placement": "replicated"})
    for gathered, matrices in run_ranks(2, gathered_of, settings):
        rows = [shape[1] if side == "right" else shape[0] // 2 for shape, side in matrices]
        assert {side for _, side in matrices} == {"right", "left"}
        assert gathered == 4 * 4 * sum(rows)


def gathered_of(settings):
    import ds_lowrank
    from ds_lowrank.optimizer.report import gathered_bytes

    engine, *_ = ds_lowrank.initialize(model=make_model(), config=settings)
    slots = engine.basic_optimizer.slots
    return gathered_bytes(slots), [(slot.shape, slot.geometry.side) for slot in slots if slot.is_projected]


def without_frozen(directory, stage):
    """Save without frozen weights, as the Trainer does with PEFT, and load over other ones."""
    import ds_lowrank

    def engine_of():
        model = make_model()
        model.model.embed_tokens.weight.requires_grad = False
        return ds_lowrank.initialize(model=model, config=config(stage, 2))[0]

    engine = engine_of()
    train_step(engine, 0)
    engine.save_checkpoint(directory, tag="here", exclude_frozen_parameters=True)
    trained = full_weights(engine)
    other = engine_of()
    try:
        other.load_checkpoint(directory, tag="here")
        message = ""
    except ds_lowrank.CheckpointError as error:
        message = str(error)
    other.load_checkpoint(directory, tag="here", load_module_strict=False)
    return message, max_relative_difference(full_weights(other), trained)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_weights_may_be_left_out(stage, tmp_path):
    for message, difference in run_ranks(2, without_frozen, str(tmp_path), stage):
        assert "it has no model.embed_tokens.weight" in message
        assert difference == 0


def mixed(directory, name):
    """Save after two steps, put a file of the first checkpoint into the second, and have the manifest confirm it."""
    import shutil
    from pathlib import Path

    import ds_lowrank
    from benchmarks.faults.damage import edit_manifest
    from ds_lowrank.collectives import broadcast_from_rank0

    engine = ds_lowrank.initialize(model=make_model(), config=config(2, 2))[0]
    for step in range(2):
        train_step(engine, step)
        engine.save_checkpoint(directory)
    first, second = Path(directory, "global_step1"), Path(directory, "global_step2")

    def mix():
        shutil.copy(first / name, second / name)
        edit_manifest(second)

    broadcast_from_rank0(mix)
    try:
        engine.load_checkpoint(directory)
    except (ds_lowrank.CheckpointError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["rank_00001.safetensors", "common.pt"])
def test_files_of_two_steps_do_not_mix_though_the_manifest_confirms_them(name, tmp_path):
    for message in run_ranks(2, mixed, str(tmp_path), name):
        assert f"mixes files of several checkpoints: {name} is not of step 2" in message
