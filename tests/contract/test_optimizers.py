"""What every optimizer of the registry promises, without DeepSpeed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import ds_lowrank
from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.registry import OPTIMIZERS

SMALL = {
    "GaLore": {"rank": 3, "update_proj_gap": 3},
    "OnlineSubspaceDescent": {"rank": 3, "basis_lr_ratio": 1.0},
    "VLoRP": {"rank": 3, "granularity": 1, "update_proj_gap": 3},
    "AdaRankGrad": {"rank_max": 3, "update_proj_gap": 3, "residual_tol": 0.3},
    "Apollo": {"rank": 3, "update_proj_gap": 3},
    "GradNormLoRP": {"rank": 3, "update_proj_gap": 3},
    "Lorenza": {"rank": 3, "update_proj_gap": 3, "perturbation_radius": 0.0},
}
"""Options for small matrices, with refreshes at steps 0, 3, 6, ... where a method has them."""

EVERY = pytest.mark.parametrize("name", sorted(OPTIMIZERS))
WITH_A_BASIS = pytest.mark.parametrize(
    "name", ["AdaRankGrad", "GaLore", "GradNormLoRP", "Lorenza", "OnlineSubspaceDescent"]
)
ADAPTIVE = {"AdaRankGrad"}


def small_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 7))


def gradients(model, step):
    torch.manual_seed(1000 + step)
    model.zero_grad()
    model(torch.randn(32, 12)).square().mean().backward()


def build(name, model, **options):
    return OPTIMIZERS[name](model.named_parameters(), **{"lr": 1e-2, **SMALL[name], **options})


def single(name, weight, **options):
    """The optimizer of one matrix."""
    return OPTIMIZERS[name]([("w", weight)], **{"lr": 0.1, **SMALL[name], **options})


def with_rank(name, rank):
    return {"rank_max" if name in ADAPTIVE else "rank": rank}


def run(optimizer, model, steps):
    for step in steps:
        gradients(model, step)
        optimizer.step()


def test_every_method_has_an_optimizer():
    assert METHODS.keys() == OPTIMIZERS.keys()
    assert all(optimizer.method is METHODS[name] for name, optimizer in OPTIMIZERS.items())


@EVERY
def test_it_descends_on_a_quadratic(name):
    torch.manual_seed(0)
    target, weight = torch.randn(16, 10), torch.nn.Parameter(torch.zeros(16, 10))
    optimizer = single(name, weight, **with_rank(name, 4), **({} if name == "VLoRP" else {"scale": 1.0}))
    start = (weight - target).square().sum().item()
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 1000)
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).square().sum().item() < 0.01 * start


def shapes(optimizer):
    state = optimizer.state_dict()["state"]
    return {n: {k: tuple(v.shape) for k, v in s.items() if torch.is_tensor(v)} for n, s in state.items()}


@EVERY
def test_state_is_complete_at_the_start_and_keeps_its_shapes(name):
    model = small_model()
    optimizer = build(name, model)
    before, keys = shapes(optimizer), {n: set(s) for n, s in optimizer.state_dict()["state"].items()}
    run(optimizer, model, range(5))
    assert {n: set(s) for n, s in optimizer.state_dict()["state"].items()} == keys
    assert set(before) == {n for n, _ in model.named_parameters()}
    if name not in ADAPTIVE:
        assert shapes(optimizer) == before


@EVERY
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
def test_state_bytes_are_what_is_stored(name, state_dtype):
    """`metrics` and `matrices` compute them; here the tensors are counted."""
    model = small_model()
    optimizer = build(name, model, state_dtype=state_dtype)
    for _ in range(3):
        stored = [v for slot in optimizer.slots if slot.is_projected for v in slot.state.values() if torch.is_tensor(v)]
        assert optimizer.metrics()["lowrank/state_bytes"] == sum(v.numel() * v.element_size() for v in stored)
        run(optimizer, model, range(2))


@EVERY
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
def test_a_saved_state_resumes_bit_for_bit_and_loads_weights_only(name, state_dtype):
    model = small_model()
    optimizer = build(name, model, state_dtype=state_dtype)
    run(optimizer, model, range(4))
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    twin = copy.deepcopy(model)
    resumed = build(name, twin, state_dtype=state_dtype)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    run(optimizer, model, range(4, 9))
    run(resumed, twin, range(4, 9))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@EVERY
@pytest.mark.parametrize(
    ("state_dtype", "stored", "bound"), [("bf16", torch.bfloat16, 0.02), ("int8", torch.uint8, 0.1)]
)
def test_coded_moments_are_stored_as_such_and_follow_fp32(name, state_dtype, stored, bound):
    """A first moment in bf16 is off by up to 2^-8, in eight bits by up to 9 %, either way, and so is a step."""
    plain, rounded = small_model(), small_model()
    start = [p.detach().clone() for p in plain.parameters()]
    exact, coarse = build(name, plain), build(name, rounded, state_dtype=state_dtype)
    run(exact, plain, range(3))
    run(coarse, rounded, range(3))
    for state in coarse.state_dict()["state"].values():
        assert state["exp_avg"].dtype == stored
        assert ("exp_avg_scale" in state) == (state_dtype == "int8")
    for a, b, s in zip(plain.parameters(), rounded.parameters(), start, strict=True):
        assert (a - b).norm() < bound * (a - s).norm()


@EVERY
def test_bf16_parameters_take_the_fp32_update_rounded(name):
    """A weight in bf16 is computed in fp32 and rounded once."""
    exact, rounded = small_model(), small_model().bfloat16()
    exact.load_state_dict({key: value.float() for key, value in rounded.state_dict().items()})
    one, two = build(name, exact), build(name, rounded)
    gradients(exact, 0)
    for a, b in zip(exact.parameters(), rounded.parameters(), strict=True):
        b.grad = a.grad.bfloat16()
        a.grad = b.grad.float()
    one.step()
    two.step()
    for a, b in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a.bfloat16(), b)


@EVERY
def test_a_zero_gradient_before_the_first_is_not_a_step(name):
    model, twin = small_model(), small_model()
    optimizer, other = build(name, model, weight_decay=0.1), build(name, twin, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    run(optimizer, model, range(3))
    run(other, twin, range(3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@WITH_A_BASIS
def test_a_zero_gradient_at_a_refresh_keeps_the_old_basis(name):
    model = small_model()
    optimizer = build(name, model)
    run(optimizer, model, range(3))
    twin = copy.deepcopy(model)
    undue = build(name, twin, **({} if name == "OnlineSubspaceDescent" else {"update_proj_gap": 100}))
    undue.load_state_dict({**optimizer.state_dict(), "param_groups": undue.state_dict()["param_groups"]})
    for slot in undue.slots:
        slot.state |= {"used_up": 0} if "used_up" in slot.state else {}
    basis = optimizer.state_dict()["state"]["0.weight"]["basis"].clone()
    for one, parameters in ((optimizer, model.parameters()), (undue, twin.parameters())):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        one.step()
    assert torch.equal(optimizer.state_dict()["state"]["0.weight"]["basis"], basis)
    # The momentum goes on in it, as in a step at which no refresh is due.
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@EVERY
def test_a_nan_gradient_changes_nothing_and_is_counted(name):
    model = small_model()
    optimizer = build(name, model)
    run(optimizer, model, range(2))
    before = copy.deepcopy(model.state_dict())
    gradients(model, 2)
    model[2].bias.grad[1] = float("inf")
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    metrics = optimizer.metrics()
    assert (metrics["lowrank/projected_matrices"], metrics["lowrank/adamw_parameters"]) == (0, 0)
    assert (metrics["lowrank/skipped_updates"], metrics["lowrank/refreshes"]) == (1, 2)
    assert [slot.state["step"] for slot in optimizer.slots] == [2] * 4


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"GradNormLoRP", "OnlineSubspaceDescent", "VLoRP"}))
def test_a_rank_deficient_gradient_gives_a_finite_update_in_its_own_subspace(name):
    """Rank 1 gradient, rank 3 asked: the directions that carry nothing are left out instead of filled with noise."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(12, 9))
    row = torch.randn(9)
    optimizer = single(name, weight)
    before = weight.detach().clone()
    weight.grad = torch.outer(torch.randn(12), row)
    optimizer.step()
    update = weight.detach() - before
    across = update - torch.outer(update @ row, row) / row.square().sum()
    assert update.norm() > 0.01
    assert across.norm() < 1e-5 * update.norm()


@EVERY
def test_groups_override_options_and_unknown_group_keys_are_refused(name):
    model = small_model()
    first, rest = list(model.named_parameters())[:1], list(model.named_parameters())[1:]
    groups = [{"params": first, "lr": 0.5, **with_rank(name, 2)}, {"params": rest, "name": "rest"}]
    optimizer = OPTIMIZERS[name](groups, **SMALL[name])
    assert {slot.tag.name: slot.rank for slot in optimizer.slots if slot.is_projected} == {"0.weight": 2, "2.weight": 3}
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-3]
    with pytest.raises(ds_lowrank.ConfigError, match="did you mean 'weight_decay'"):
        OPTIMIZERS[name]([{"params": rest, "weight_deccay": 0.1}], **SMALL[name])


def test_a_group_may_switch_mini_on_or_off_and_gets_the_defaults_of_that():
    model = small_model()
    first, rest = list(model.named_parameters())[:1], list(model.named_parameters())[1:]
    optimizer = OPTIMIZERS["Apollo"]([{"params": first, "mini": True}, {"params": rest}], lr=0.1)
    assert [(group["rank"], group["scale"]) for group in optimizer.param_groups] == [(1, 128**0.5), (128, 1.0)]
    assert [slot.rank for slot in optimizer.slots if slot.is_projected] == [1, 7]
    optimizer = OPTIMIZERS["Apollo"]([{"params": first, "mini": False}, {"params": rest}], lr=0.1, mini=True)
    assert [(group["rank"], group["scale"]) for group in optimizer.param_groups] == [(128, 1.0), (1, 128**0.5)]


@EVERY
def test_the_class_can_be_pickled_and_found_in_the_package(name):
    assert pickle.loads(pickle.dumps(OPTIMIZERS[name])) is OPTIMIZERS[name] is getattr(ds_lowrank, name)


@EVERY
def test_groups_in_another_order_are_refused(name):
    model = small_model()
    first, rest = ({"params": part.named_parameters(prefix=str(i)), "lr": i} for i, part in enumerate(model) if i != 1)
    saved = OPTIMIZERS[name]([first, rest], **SMALL[name]).state_dict()
    rest, first = ({"params": part.named_parameters(prefix=str(i)), "lr": i} for i, part in enumerate(model) if i != 1)
    with pytest.raises(ds_lowrank.CheckpointError, match="parameter group 0 has other parameters"):
        OPTIMIZERS[name]([first, rest], **SMALL[name]).load_state_dict(saved)


@EVERY
def test_nameless_parameters_are_refused_and_tags_are_enough(name):
    model = small_model()
    with pytest.raises(ds_lowrank.ConfigError, match="named_parameters"):
        OPTIMIZERS[name](model.parameters())
    ds_lowrank.tag_parameters(model)
    assert len(OPTIMIZERS[name](model.parameters(), **SMALL[name]).slots) == 4


@EVERY
def test_learning_rate_zero_changes_nothing(name):
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    run(build(name, model, lr=0.0, weight_decay=0.3), model, range(3))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@EVERY
def test_the_update_does_not_depend_on_the_global_random_state(name):
    results = []
    for seed in (1, 2):
        model = small_model()
        optimizer = build(name, model)
        for step in range(4):
            gradients(model, step)
            torch.manual_seed(seed)
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    model = small_model()
    torch.manual_seed(5)
    expected = torch.rand(1)
    optimizer = build(name, model)
    gradients(model, 0)
    torch.manual_seed(5)
    optimizer.step()
    assert torch.equal(torch.rand(1), expected)


@EVERY
def test_metrics_count_what_the_last_step_changed(name):
    model = small_model()
    optimizer = build(name, model)
    run(optimizer, model, range(1))
    assert (optimizer.metrics()["lowrank/projected_matrices"], optimizer.metrics()["lowrank/adamw_parameters"]) == (
        2,
        2,
    )
    gradients(model, 1)
    model[0].weight.grad = None
    optimizer.step()
    assert (optimizer.metrics()["lowrank/projected_matrices"], optimizer.metrics()["lowrank/adamw_parameters"]) == (
        1,
        2,
    )


@EVERY
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_very_small_and_very_large_gradients_take_the_same_step(name, scale):
    """Adam's first step is a direction alone, so a common factor must not change it.

    Beyond these scales the squares leave fp32 in Adam's own second moment, in any Adam.
    """
    steps = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(12, 9))
        optimizer = single(name, weight, eps=1e-30)
        weight.grad = torch.randn(12, 9) * factor
        optimizer.step()
        steps.append(weight.detach())
    assert torch.allclose(*steps, rtol=0, atol=1e-5)


@EVERY
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-25])
def test_a_gradient_whose_squares_underflow_leaves_everything_finite(name, scale):
    """The first one, where sums of squares would be divided by each other, and one in between."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(12, 9))
    optimizer = single(name, weight)
    for factor in (scale, 1.0, scale, 1.0):
        weight.grad = torch.randn(12, 9) * factor
        optimizer.step()
    assert weight.isfinite().all()
    assert all(v.isfinite().all() for v in optimizer.slots[0].state.values() if torch.is_tensor(v))
    assert optimizer.skipped_updates == 0


@EVERY
@pytest.mark.parametrize("scale", [1e17, 1e30])
def test_a_gradient_whose_squares_overflow_is_skipped_and_counted(name, scale):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(12, 9))
    optimizer = single(name, weight)
    for factor in (1.0, scale, 1.0):
        weight.grad = torch.randn(12, 9) * factor
        optimizer.step()
    assert weight.isfinite().all()
    assert (optimizer.skipped_updates, optimizer.slots[0].state["step"]) == (1, 2)


@EVERY
def test_matrices_are_stepped_in_waves_of_bounded_size_and_the_result_is_the_same(name, monkeypatch):
    results = []
    for bucket in (2**28, 1):
        monkeypatch.setattr("ds_lowrank.optimizer.step.BUCKET_ELEMENTS", bucket)
        model = small_model()
        run(build(name, model), model, range(4))
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@EVERY
def test_a_name_or_a_parameter_given_twice_is_refused(name):
    first, second = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    with pytest.raises(ds_lowrank.ConfigError, match="weight: given twice"):
        OPTIMIZERS[name]([*first.named_parameters(), *second.named_parameters()])
    with pytest.raises(ds_lowrank.ConfigError, match="a: given twice"):
        OPTIMIZERS[name]([("a", first.weight), ("a", first.weight)])


@EVERY
def test_a_group_may_come_as_a_generator_and_its_values_are_validated_and_kept(name):
    model = small_model()
    group = {"params": model[0].named_parameters(prefix="0"), "lr": 1, "betas": [0.8, 0.9]}
    optimizer = OPTIMIZERS[name]([group], **SMALL[name])
    optimizer.add_param_group({"params": model[2].named_parameters(prefix="2")})
    assert len(optimizer.slots) == 4
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]) == (1.0, (0.8, 0.9))
    with pytest.raises(ds_lowrank.ConfigError, match=r"'\*typo\*' matches no parameter"):
        OPTIMIZERS[name]([{"params": model.named_parameters(), "exclude_modules": ["*typo*"]}], **SMALL[name])


@EVERY
def test_what_cannot_be_stepped_is_refused_before_anything_changes(name):
    transposed = torch.nn.Parameter(torch.randn(4, 6).T)
    with pytest.raises(ds_lowrank.ConfigError, match="not contiguous"):
        single(name, transposed).bind()
    with pytest.raises(ds_lowrank.ConfigError, match="float64; the arithmetic is fp32"):
        OPTIMIZERS[name]([("w", torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64)))])
    table = torch.nn.Embedding(5, 4, sparse=True)
    optimizer = OPTIMIZERS[name](table.named_parameters(), **SMALL[name])
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


@EVERY
def test_replaced_parameters_are_an_error_and_not_a_step_that_does_nothing(name):
    model = small_model()
    optimizer = build(name, model)
    run(optimizer, model, range(1))
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.zeros(20, 12))
    with pytest.raises(RuntimeError, match="not built with"):
        optimizer.step()


@EVERY
def test_autocast_around_the_step_changes_nothing(name):
    results = []
    for enabled in (False, True):
        model = small_model()
        optimizer = build(name, model)
        gradients(model, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@EVERY
def test_frozen_parameters_may_have_any_dtype(name):
    model = small_model()
    model.register_parameter("scales", torch.nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    assert len(build(name, model).slots) == 4


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
def test_the_role_table_says_how_moments_are_stored_and_counts_the_bytes(state_dtype):
    from ds_lowrank.optimizer.report import role_table, state_bytes, take_inventory

    slots = build("GaLore", small_model(), state_dtype=state_dtype).slots
    text = role_table([take_inventory(slots, [])], state_bytes(slots), 1)
    assert text.endswith("." if state_dtype == "fp32" else f"Moments are stored in {state_dtype}.")
    stored = [v for slot in slots for v in slot.state.values() if torch.is_tensor(v)]
    assert sum(state_bytes(slots)) == sum(v.numel() * v.element_size() for v in stored)
