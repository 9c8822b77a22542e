"""What a step depends on and what it changes: nothing global, and each weight once."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch

import ds_lowrank
from ds_lowrank.adapters.model import AdapterLinear, add_adapters, merge_adapters, merged_weights
from ds_lowrank.optimizer.registry import OPTIMIZERS
from tests.contract.cases import (
    EVERY,
    PROBES,
    assert_equal,
    build,
    copy_of,
    perturbed,
    run,
    small_model,
    take_gradients,
)


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
def test_no_call_reads_or_changes_the_global_random_state(name):
    results = []
    for seed in (1, 2):
        model = small_model()
        torch.manual_seed(seed)
        expected = torch.get_rng_state()
        optimizer = build(name, model)
        optimizer.bind()
        assert torch.equal(torch.get_rng_state(), expected)
        for step in range(4):
            take_gradients(model, step)
            torch.manual_seed(seed)
            optimizer.step()
            optimizer.metrics()
            optimizer.load_state_dict(optimizer.state_dict())
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
        monkeypatch.setattr("ds_lowrank.optimizer.stacks.BUCKET_ELEMENTS", bucket)
        model = small_model()
        run(build(name, model), model, range(4))
        results.append(copy_of(model))
    assert_equal(*results)


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
@EVERY
def test_layers_of_one_shape_step_as_each_alone(name, state_dtype, monkeypatch):
    """As stacks of three matrices and of three biases, and in stacks of one: equal up to sums in another order.

    After one step no moment has been rounded yet, and Adam's first direction is the sign of what it is given.
    """
    results = []
    for bucket in (2**28, 1):
        monkeypatch.setattr("ds_lowrank.optimizer.stacks.BUCKET_ELEMENTS", bucket)
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(12, 12) for _ in range(3)))
        run(build(name, model, state_dtype=state_dtype), model, range(1))
        results.append(copy_of(model))
    for together, alone in zip(*results, strict=True):
        assert torch.allclose(together, alone, rtol=0, atol=1e-6)  # of a step of 1e-2


@contextlib.contextmanager
def deterministic():
    """Uninitialized memory is then filled with NaN, so that whoever reads it is found."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "bf16 autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "fp16 autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic algorithms": deterministic,
}
AROUND = pytest.mark.parametrize("mode", list(MODES))


def trained(name, context, steps=4):
    """Train with the step alone in a context."""
    model = small_model()
    optimizer = build(name, model)
    for step in range(steps):
        take_gradients(model, step)
        with context():
            optimizer.step()
    states = [slot.state for slot in optimizer.slots]
    return [*copy_of(model), *(value.clone() for state in states for value in state.values() if torch.is_tensor(value))]


@EVERY
@AROUND
def test_a_mode_around_a_step_changes_nothing(name, mode):
    assert_equal(trained(name, MODES[mode]), trained(name, contextlib.nullcontext))


@EVERY
@AROUND
def test_a_mode_around_the_start_or_a_resume_changes_nothing(name, mode):
    """State that is made in inference mode could otherwise not be changed outside."""
    results = []
    for context in (contextlib.nullcontext, MODES[mode]):
        model, twin = small_model(), small_model()
        with context():
            optimizer, resumed = build(name, model), build(name, twin)
            optimizer.bind()
        run(optimizer, model, range(2))
        with context():
            optimizer.metrics()
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        twin.load_state_dict(model.state_dict())
        for own, of_own in ((optimizer, model), (resumed, twin)):
            run(own, of_own, range(2, 4))
        results.append([*copy_of(model), *copy_of(twin)])
    assert_equal(*results)
    assert_equal(results[1][:4], results[1][4:])


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"no gradients", "inference"}))
@pytest.mark.parametrize("options", PROBES, ids=str)
def test_a_mode_around_a_perturbation_changes_nothing(options, mode):
    assert_equal(perturbed(MODES[mode], options), perturbed(contextlib.nullcontext, options))


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_around_adding_and_merging_adapters_changes_nothing(axis, dtype):
    results = []
    for enabled in (False, True):
        model = small_model()
        with torch.autocast("cpu", dtype, enabled=enabled):
            add_adapters(model, adapter_rank=3, norm_axis=axis, target_modules=["0"])
        with torch.no_grad():
            model[0].lora_B.normal_(generator=torch.Generator().manual_seed(1))
        weights = {key: value.detach() for key, value in model.named_parameters()}
        with torch.autocast("cpu", dtype, enabled=enabled):
            whole = merged_weights(model, weights)
            merge_adapters(model)
        results.append([*whole.values(), *copy_of(model)])
    assert_equal(*results)


def test_adding_and_merging_adapters_neither_reads_nor_changes_the_global_random_state():
    results = []
    for seed in (1, 2):
        model = small_model()
        torch.manual_seed(seed)
        expected = torch.get_rng_state()
        add_adapters(model, adapter_rank=3, target_modules=["0"])
        results.append(copy_of(model))
        merge_adapters(model)
        assert torch.equal(torch.get_rng_state(), expected)
    assert_equal(*results)


def test_autocast_around_a_backward_pass_leaves_the_norms_of_adapters_in_fp32():
    """Only the products of the layer itself may be rounded."""
    gradients = []
    for enabled in (False, True):
        layer = AdapterLinear(torch.nn.Linear(12, 20), "w", 3, 6.0)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer._factor().square().sum().backward()
        gradients.append([layer.lora_A.grad, layer.lora_B.grad, layer.magnitude.grad])
    assert_equal(*gradients)


@EVERY
def test_eps_stands_beside_the_root_that_is_asked_for(name):
    """In the first step, beside the uncorrected root, it is as large as ``eps / sqrt(1 - beta2)`` beside the other."""
    beta2 = 0.96
    weights = []
    for options in (
        {"eps_root": "uncorrected", "eps": 0.01},
        {"eps_root": "corrected", "eps": 0.01 / (1 - beta2) ** 0.5},
    ):
        model = small_model()
        optimizer = build(name, model, betas=(0.9, beta2), **options)
        run(optimizer, model, range(1))
        weights.append(copy_of(model))
    if "exp_avg_sq" in next(iter(optimizer.state_dict()["state"].values())):
        for one, other in zip(*weights, strict=True):
            assert (one - other).norm() < 1e-6 * other.norm()
