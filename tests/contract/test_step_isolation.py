"""What a step depends on and what it changes: nothing global, and each weight once."""

from __future__ import annotations

import pickle

import pytest
import torch

import ds_lowrank
from ds_lowrank.optimizer.registry import OPTIMIZERS
from tests.contract.cases import EVERY, assert_equal, build, copy_of, run, small_model, take_gradients


@EVERY
def test_class_is_found_in_the_package(name):
    assert getattr(ds_lowrank, name) is OPTIMIZERS[name]


@pytest.mark.parametrize("name", sorted(name for name in OPTIMIZERS if name in ds_lowrank.__all__))
def test_class_is_pickled_by_its_name(name):
    assert pickle.loads(pickle.dumps(OPTIMIZERS[name])) is OPTIMIZERS[name]


@EVERY
def test_bf16_weights_take_the_fp32_update_rounded_once(name):
    exact, rounded = small_model(), small_model().bfloat16()
    exact.load_state_dict({key: value.float() for key, value in rounded.state_dict().items()})
    one, two = build(name, exact), build(name, rounded)
    take_gradients(exact, 0)
    for a, b in zip(exact.parameters(), rounded.parameters(), strict=True):
        b.grad = a.grad.bfloat16()
        a.grad = b.grad.float()
    one.step()
    two.step()
    for a, b in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a.bfloat16(), b)


@EVERY
def test_learning_rate_zero_changes_nothing(name):
    model = small_model()
    before = copy_of(model)
    run(build(name, model, lr=0.0, weight_decay=0.3), model, range(3))
    assert_equal(model.parameters(), before)


@EVERY
def test_step_neither_reads_nor_changes_the_global_random_state(name):
    results = []
    for seed in (1, 2):
        model = small_model()
        optimizer = build(name, model)
        for step in range(4):
            take_gradients(model, step)
            torch.manual_seed(seed)
            expected = torch.get_rng_state()
            optimizer.step()
            assert torch.equal(torch.get_rng_state(), expected)
        results.append(copy_of(model))
    assert_equal(*results)


@EVERY
def test_metrics_count_what_the_last_step_changed(name):
    def changed():
        metrics = optimizer.metrics()
        return metrics["lowrank/projected_matrices"], metrics["lowrank/adamw_parameters"]

    model = small_model()
    optimizer = build(name, model)
    run(optimizer, model, range(1))
    assert changed() == (2, 2)
    take_gradients(model, 1)
    model[0].weight.grad = None
    optimizer.step()
    assert changed() == (1, 2)


@EVERY
def test_result_does_not_depend_on_buckets(name, monkeypatch):
    results = []
    for bucket in (2**28, 1):
        monkeypatch.setattr("ds_lowrank.optimizer.step.BUCKET_ELEMENTS", bucket)
        model = small_model()
        run(build(name, model), model, range(4))
        results.append(copy_of(model))
    assert_equal(*results)


@EVERY
def test_autocast_around_a_step_changes_nothing(name):
    results = []
    for enabled in (False, True):
        model = small_model()
        optimizer = build(name, model)
        take_gradients(model, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
        results.append(copy_of(model))
    assert_equal(*results)
