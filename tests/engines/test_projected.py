"""Projected reduction and accumulation under real engines, against one dense process with the summed gradient, fp32."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from tests.engines.grids import Grid, own_initialize_error, run_grid, settings_of
from tests.engines.grids import oracle as grid_oracle
from tests.engines.pool import run_ranks
from tests.engines.scenario import (
    LENGTH,
    VOCAB,
    Oracle,
    config,
    full_weights,
    make_model,
    max_relative_difference,
    run_engine,
    train_step,
)
from tests.engines.test_state_engines import resume, train_with_a_nan

STEPS = 10  # refreshes, where there are any, at steps 0, 4 and 8
EXACT = ["AdaRankGrad", "GaLore", "GradNormLoRP", "Lorenza", "VLoRP"]
PROJECTED = {"reduction": "projected"}
LAYOUTS = [(1, 1), (1, 4), (2, 4), (3, 1), (4, 1)]  # ranks, micro-batches


@functools.cache
def oracle(method):
    dense = Oracle(method=method)
    dense.step(0)
    first = dense.weights()
    for step in range(1, STEPS):
        dense.step(step)
    return first, dense.weights()


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize(("world", "gas"), LAYOUTS)
def test_every_world_and_accumulation_matches_one_process(world, gas, method):
    settings = config(0, world, gas=gas, method=method, params=PROJECTED)
    first, last = oracle(method)
    results = run_ranks(world, run_engine, settings, STEPS)
    for result in results:
        assert max_relative_difference(result["first"], first) < 1e-5
        assert max_relative_difference(result["last"], last) < 1e-4
        assert result["metrics"]["lowrank/projected_matrices"] == 14
        assert result["wrapper"] == method


VARIANTS = [
    ("GradNormLoRP", {"norm_axis": "input"}),  # units along what is summed over, on one side or the other
    ("GaLore", {"proj_type": "reverse_std", "moments": "rotate", "projector": "svd"}),
    ("GaLore", {"inner": "lion", "lion_sign": "original"}),
    ("GaLore", {"projector": "random", "moments": "rotate"}),
    ("GaLore", {"projector": "dct", "moments": "rotate"}),
    ("GradNormLoRP", {"projector": "dct", "norm_axis": "input"}),
    ("Flora", {"second_moment": "none", "newest_term": "projected"}),
    ("OnlineSubspaceDescent", {"pca_norm": "projected"}),
    ("OnlineSubspaceDescent", {"pca_norm": "projected", "basis_optimizer": "sgd", "proj_type": "reverse_std"}),
    ("OnlineSubspaceDescent", {"basis_optimizer": "random", "update_proj_gap": 4, "basis_lr_ratio": 5.0}),
    ("VLoRP", {"granularity": "1/2", "proj_type": "reverse_std"}),
    ("VLoRP", {"update_scheme": "subspace"}),
    ("VLoRP", {"update_scheme": "sgd", "scale": 0.25}),
    ("Lorenza", {"probe_form": "gaussian", "moment_on_refresh": "reset"}),
    ("Sumo", {"complement": 0.0}),
    ("Sumo", {"complement": 0.0, "proj_type": "std", "grad_norm_tol": 0.5}),
]


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=str)
def test_options_match_one_process(method, options):
    dense = Oracle(method=method, **options)
    for step in range(STEPS):
        dense.step(step)
    settings = config(0, 2, gas=2, method=method, params={**PROJECTED, **options})
    for result in run_ranks(2, run_engine, settings, STEPS):
        assert max_relative_difference(result["last"], dense.weights()) < 1e-4


ROUNDED = [
    ("GaLore", {"basis_dtype": "int4"}),
    ("GaLore", {"basis_dtype": "int4", "projector": "random"}),
    ("OnlineSubspaceDescent", {"basis_dtype": "int4", "basis_optimizer": "random", "update_proj_gap": 4}),
]


@pytest.mark.parametrize(("method", "options"), ROUNDED, ids=str)
def test_bases_that_were_rounded_are_those_that_backward_projects_onto(method, options):
    """With whole gradients a basis is gathered from what is stored in every step."""
    options = {**options, **({"basis_lr_ratio": 5.0} if method == "OnlineSubspaceDescent" else {})}
    settings = [config(0, 2, gas=2, method=method, params={**params, **options}) for params in (PROJECTED, {})]
    projected, whole = (run_ranks(2, run_engine, own, STEPS)[0] for own in settings)
    assert max_relative_difference(projected["last"], whole["last"]) < 1e-4


@pytest.mark.parametrize("method", EXACT)
def test_weights_without_masters_stay_the_same_bits_on_all_ranks(method):
    """As with whole gradients in bf16, whose sums are rounded: what the runs differ by is that rounding."""
    params = {**PROJECTED, "master_weights": False, "state_dtype": "int8"}
    results = run_ranks(2, run_engine, config(0, 2, "bf16", gas=2, method=method, params=params), 6)
    assert all(torch.equal(results[0]["last"][name], results[1]["last"][name]) for name in results[0]["last"])
    assert all(result["metrics"]["lowrank/projected_matrices"] == 14 for result in results)


GRIDS = [Grid(1, 2, 1, 0), Grid(1, 1, 2, 0), Grid(2, 2, 1, 0), Grid(2, 1, 2, 0), Grid(2, 2, 1, 0, "autotp")]
CROSSED = [Grid(2, 2, 1, 0), Grid(2, 1, 2, 0)]
ON_GRIDS = [*((grid, "GaLore") for grid in GRIDS), *((grid, m) for grid in CROSSED for m in EXACT if m != "GaLore")]


@pytest.mark.parametrize(("grid", "method"), ON_GRIDS, ids=str)
def test_every_grid_matches_one_process(grid, method):
    settings = settings_of(grid, gas=2, method=method, params=PROJECTED)
    results = run_ranks(grid.world, run_grid, grid, settings, STEPS)
    (first, last), _ = grid_oracle(method, 0.0, STEPS)
    assert max_relative_difference(results[0]["weights"][0], first) < 1e-5
    assert max_relative_difference(results[0]["weights"][1], last) < 1e-4
    assert all(result["norms"] == results[0]["norms"] for result in results)


class ClippedByProjectedNorm(Oracle):
    """GaLore, clipped by the norm of all H Q and of the gradients that are not projected."""

    def __init__(self, limit, **options):
        super().__init__(**options)
        self.limit, self.projected_norms = limit, []

    def gradients(self, step):
        found = super().gradients(step)
        square = sum(self.seen(self.rules[name], gradient).double().square().sum() for name, gradient in found.items())
        norm = math.sqrt(square)
        self.projected_norms.append(norm)
        scale = min(1.0, self.limit / (norm + 1e-6))
        return {name: gradient * scale for name, gradient in found.items()}

    @staticmethod
    def seen(rule, gradient):
        if not hasattr(rule, "find_basis"):
            return gradient
        basis = rule.find_basis(gradient) if rule.t % rule.gap == 0 else rule.basis
        return (gradient if rule.right else gradient.T) @ basis


def test_gradients_are_clipped_by_the_norm_of_what_is_projected():
    """Some steps are clipped and some are not; every rank reports the norm before clipping."""
    limit, steps = 0.56, 10
    oracle = ClippedByProjectedNorm(limit)
    for step in range(steps):
        oracle.step(step)
    assert min(oracle.projected_norms) < limit < max(oracle.projected_norms)
    params = {**PROJECTED, "projected_gradient_clipping": limit}
    for result in run_ranks(2, clipped, config(0, 2, gas=2, params=params), steps):
        assert max_relative_difference(result["weights"], oracle.weights()) < 1e-4
        pairs = zip(result["norms"], oracle.projected_norms, strict=True)
        assert max(abs(own / whole - 1) for own, whole in pairs) < 1e-4


def clipped(settings, steps):
    import ds_lowrank

    engine, *_ = ds_lowrank.initialize(model=make_model(), config=settings)
    norms = []
    for step in range(steps):
        train_step(engine, step)
        norms.append(engine.get_global_grad_norm())
    return {"weights": full_weights(engine), "norms": norms}


@pytest.mark.parametrize("method", EXACT)
def test_no_whole_gradient_outlives_its_own_projection(method):
    """Counted whenever backward has made one: that one, and none after the last micro-batch, unless a basis is due."""
    settings = config(0, 2, gas=2, method=method, params=PROJECTED)
    for most, left, due in run_ranks(2, gradients_alive, settings, 7):
        ordinary = [step for step in range(7) if not due[step]]
        assert len(ordinary) >= 4 and max(most[step] for step in ordinary) == 1
        assert all(left[step] == due[step] for step in range(7))


def gradients_alive(settings, steps):
    """For every step: the most whole gradients of projected matrices at a time, how many were left, and kept."""
    import ds_lowrank

    model = make_model()
    engine, *_ = ds_lowrank.initialize(model=model, config=settings)
    optimizer = engine.basic_optimizer
    projected = [slot.parameter for slot in optimizer.slots if slot.is_projected]
    alive, most, left, due = [], [], [], []

    def count(_):
        alive.append(sum(parameter.grad is not None for parameter in projected) + 1)  # and what is being accumulated

    for parameter in projected:
        parameter.register_hook(count)
    take_step = optimizer.step
    optimizer.step = lambda *given: (left.append(sum(p.grad is not None for p in projected)), take_step(*given))
    for step in range(steps):
        before = optimizer.metrics()["lowrank/refreshes"]
        alive.clear()
        train_step(engine, step)
        most.append(max(alive))
        due.append(0 if method_is_random(settings) else optimizer.metrics()["lowrank/refreshes"] - before)
    return most, left, due


def method_is_random(settings):
    """Whether new bases need no gradient."""
    return settings["optimizer"]["type"] == "VLoRP"


@pytest.mark.parametrize(("method", "bad"), list(zip(EXACT, [0, 2, 4, 0, 4], strict=True)))
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(bad, method):
    oracle = Oracle(method=method)
    for step in range(6):
        if step != bad:
            oracle.step(step)
    for result in run_ranks(2, train_with_a_nan, config(0, 2, gas=2, method=method, params=PROJECTED), 6, bad):
        assert result["skipped"] == 1
        assert max_relative_difference(result["weights"], oracle.weights()) < 1e-4


@pytest.mark.parametrize(("method", "interrupt"), list(zip(EXACT, [3, 4, 3, 4, 3], strict=True)))
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(interrupt, method, tmp_path):
    settings = config(0, 2, gas=2, method=method, params={**PROJECTED, "state_dtype": "int8"})
    through = run_ranks(2, resume, settings, str(tmp_path), None, 7)
    resumed = run_ranks(2, resume, settings, str(tmp_path), interrupt, 7)
    for a, b in zip(through, resumed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert all(torch.equal(a[name], through[0][name]) for name in a), "the ranks have drifted apart"


@pytest.mark.parametrize("method", ["GaLore", "GradNormLoRP"])
@pytest.mark.parametrize("stagger", [False, True])
def test_a_random_first_basis_needs_no_gradient(stagger, method):
    params = {**PROJECTED, "first_basis": "random", "stagger": stagger}
    results = run_ranks(2, run_engine, config(0, 2, gas=2, method=method, params=params), STEPS)
    if stagger:  # the dense reference refreshes all matrices at once: compare with whole gradients
        whole = run_ranks(1, run_engine, config(0, 1, method=method, params={**params, "reduction": "gradient"}), STEPS)
        first, last = whole[0]["first"], whole[0]["last"]
    else:
        oracle = Oracle(method=method, first_basis="random")
        oracle.step(0)
        first = oracle.weights()
        for step in range(1, STEPS):
            oracle.step(step)
        last = oracle.weights()
    for result in results:
        assert max_relative_difference(result["first"], first) < 1e-5
        assert max_relative_difference(result["last"], last) < 1e-4


@pytest.mark.parametrize("method", EXACT)
def test_a_part_of_the_model_that_one_rank_does_not_use_counts_as_zeros_there(method):
    """And a rank whose batch is empty: its loss has no gradient worth the name, and it does not hold up the others."""
    settings = config(0, 2, method=method, params=PROJECTED)
    results = run_ranks(2, train_partly, settings, 6)
    whole = run_ranks(1, train_partly_alone, config(0, 1, method=method), 6)[0]
    for result in results:
        assert max_relative_difference(result, whole) < 1e-4


class Branched(torch.nn.Module):
    """Two towers of which a batch uses one or both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.towers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(40, 99), torch.nn.Tanh(), torch.nn.Linear(99, 40)) for _ in range(2)
        )

    def forward(self, x, used):
        return sum((self.towers[i](x).square().mean() for i in used), x.sum() * 0)


def partial_batches(step):
    """What each of two ranks sees, and which towers it uses; in step 3 the second has nothing."""
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(step), device="cpu", dtype=torch.float32)
    return [(x[0], (0, 1)), (x[1], ((1,), (1,), (0,), (), (0, 1), (1,))[step % 6])]


def train_partly(settings, steps):
    import torch.distributed as dist

    import ds_lowrank

    engine = ds_lowrank.initialize(model=Branched(), config=settings)[0]
    for step in range(steps):
        x, used = partial_batches(step)[dist.get_rank()]
        ds_lowrank.forward_backward(engine, [lambda x=x, used=used: engine(x.requires_grad_(), used)])
        engine.step()
    return full_weights(engine)


def train_partly_alone(settings, steps):
    import ds_lowrank

    engine = ds_lowrank.initialize(model=Branched(), config=settings)[0]
    for step in range(steps):
        both = partial_batches(step)
        ds_lowrank.forward_backward(
            engine, [lambda both=both: sum(engine(x.clone().requires_grad_(), used) for x, used in both) / 2]
        )
        engine.step()
    return full_weights(engine)


REFUSED = [
    ({"stage": 1}, {}, "zero_optimization.stage 1: DeepSpeed reduces whole gradients there"),
    ({"stage": 2}, {}, "zero_optimization.stage 2: DeepSpeed reduces whole gradients there"),
    ({"stage": 3}, {}, "zero_optimization.stage 3: DeepSpeed reduces whole gradients there"),
    ({"stage": 0, "clip": 1.0}, {}, "gradient_clipping 1.0: nobody has the norm of the whole gradient"),
    ({"stage": 0, "method": "Apollo"}, {}, "it scales the gradient itself"),
    *(({"stage": 0, "method": method}, {}, "it scales the gradient itself") for method in ("Scale", "Racs")),
    ({"stage": 0, "method": "Flora"}, {}, "set second_moment to 'none' and newest_term to 'projected'"),
    ({"stage": 0, "method": "OnlineSubspaceDescent"}, {}, "its loss divides by the norm of the summed gradient"),
    ({"stage": 0, "method": "Lorenza"}, {"rank": None, "probe_form": "gaussian"}, "AdaZo-SAM steps on whole gradients"),
    ({"stage": 0, "method": "Lorenza"}, {"orthogonal_component": True}, "Lorenza+ adds what the subspace leaves out"),
    ({"stage": 0, "method": "VLoRP"}, {"update_scheme": "original_space"}, "keeps moments of every element"),
    ({"stage": 0, "method": "Sumo"}, {}, "it adds what the subspace leaves out of the gradient: set complement to 0"),
    ({"stage": 0, "method": "Gum"}, {}, "it steps some matrices whole"),
    ({"stage": 0, "method": "Cosmos"}, {}, "it finds a new basis in every gradient, and averages all of it"),
    ({"stage": 0, "dtype": "bf16"}, {}, "master_weights"),
    ({"stage": 0, "fp16": {"enabled": True}}, {}, "fp16"),
]


@pytest.mark.parametrize(("given", "params", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_go_with_projected_reduction_is_refused_on_every_rank(given, params, message):
    settings = config(**{"world": 2, **given}, params={**PROJECTED, **params})
    assert all(message in said for said in run_ranks(2, refusal, settings))


def refusal(settings):
    return own_initialize_error(make_model(), settings)


def test_deepspeeds_default_clipping_is_switched_off():
    settings = config(0, 1, params=PROJECTED)
    del settings["gradient_clipping"]  # DeepSpeed then clips at 1.0
    (result,) = run_ranks(1, run_engine, settings, 2)
    (explicit,) = run_ranks(1, run_engine, config(0, 1, params=PROJECTED), 2)
    assert max_relative_difference(result["last"], explicit["last"]) == 0


def test_several_ranks_without_an_engine_are_refused():
    assert all("needs an engine of ds_lowrank.initialize" in said for said in run_ranks(2, without_engine))


def without_engine():
    import ds_lowrank

    optimizer = ds_lowrank.GaLore(make_model(), rank=4, reduction="projected")
    try:
        optimizer.bind()
    except ds_lowrank.ConfigError as error:
        return str(error)
    return ""


def test_no_sync_is_refused():
    assert "no_sync with reduction 'projected'" in run_ranks(1, no_sync, config(0, 1, params=PROJECTED))[0]


def no_sync(settings):
    import ds_lowrank

    engine = ds_lowrank.initialize(model=make_model(), config=settings)[0]
    try:
        engine.no_sync()
    except ds_lowrank.ConfigError as error:
        return str(error)
    return ""


def test_options_that_decide_what_is_projected_cannot_change_between_steps():
    assert (
        "update_proj_gap was changed between two steps" in run_ranks(1, change_gap, config(0, 1, params=PROJECTED))[0]
    )


def change_gap(settings):
    import ds_lowrank

    engine = ds_lowrank.initialize(model=make_model(), config=settings)[0]
    train_step(engine, 0)
    engine.basic_optimizer.param_groups[0]["lr"] = 1e-3
    train_step(engine, 1)
    engine.basic_optimizer.param_groups[0]["update_proj_gap"] = 3
    try:
        train_step(engine, 2)
    except ds_lowrank.ConfigError as error:
        return str(error)
    return ""


def test_a_plain_loop_without_an_engine_accumulates_projections():
    """One process, torch only: as the same optimizer on whole gradients, to the order of fp32 sums."""
    import ds_lowrank

    found = []
    for reduction in ("gradient", "projected"):
        model = make_model()
        optimizer = ds_lowrank.GaLore(model, lr=1e-2, rank=4, update_proj_gap=4, reduction=reduction)
        optimizer.bind()
        for step in range(6):
            optimizer.zero_grad()
            for micro in torch.randint(
                0, VOCAB, (2, 4, LENGTH), generator=torch.Generator().manual_seed(step), device="cpu"
            ):
                (model(input_ids=micro, labels=micro).loss / 2).backward()
            optimizer.step()
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert max_relative_difference(found[1], found[0]) < 1e-4
