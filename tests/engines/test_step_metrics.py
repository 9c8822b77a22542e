"""Captured energy and the size of an update, under real engines, are those of one process with whole matrices."""

from __future__ import annotations

import functools

import pytest
import torch

from ds_lowrank.reference import DENSE
from ds_lowrank.reference.gradnormlorp import DenseGradNormLoRP
from tests.engines import grids
from tests.engines.grids import Grid, GridOracle, dense_model, settings_of
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, Oracle, config, make_model, train_step
from tests.engines.test_local_projection_engines import ShardOracle

STEPS = 6  # new bases of GaLore in steps 0 and 4
ENERGY = "lowrank/captured_energy", "lowrank/least_captured_energy"
# A sum of squares in fp32, of gradients that themselves differ by 1e-5 between layouts after some steps.
CLOSE = {"rel": 1e-4}


def expected_of(oracle, steps=STEPS):
    """The dense oracle's mean and least energy of the step's new bases, and the update ratio, of each step."""
    found = []
    rules = {name: rule for name, rule in oracle.rules.items() if hasattr(rule, "rank")}
    for step in range(steps):
        before = {name: rule.weight.clone() for name, rule in rules.items()}
        energies, gradients = [], oracle.gradients(step)
        for name, gradient in gradients.items():
            rule = oracle.rules[name]
            projected = rule.tangent(gradient)[0] if isinstance(rule, DenseGradNormLoRP) else gradient
            own = getattr(rule, "galore", rule)
            old = getattr(own, "basis", None)
            rule.step(gradient)
            if name in rules and own.basis is not old:
                H = (projected if own.right else projected.T).double()
                energies.append(((H @ own.basis.double()).square().sum() / H.square().sum()).item())
        oracle.t += 1
        moved = sum((rule.weight.double() - before[name]).square().sum() for name, rule in rules.items())
        size = sum(weight.double().square().sum() for weight in before.values())
        mean = sum(energies) / len(energies) if energies else None
        found.append((mean, min(energies, default=None), (moved / size).sqrt().item()))
    return found


@functools.cache
def dense(method, **options):
    return expected_of(Oracle(method=method, **options))


@functools.cache
def dense_on_grid(method):
    return expected_of(GridOracle(0.0, dense_model(), method=method))


def measured(engine, step_of, steps=STEPS):
    found = []
    for step in range(steps):
        with engine.basic_optimizer.updates_measured() as ratio:
            step_of(engine, step)
        energy = engine.basic_optimizer.captured_energy()
        found.append((*(energy[key] for key in ENERGY), ratio()))
    return found


def measure_flat(settings):
    import ds_lowrank

    return measured(ds_lowrank.initialize(model=make_model(), config=settings)[0], train_step)


def measure_grid(grid, settings):
    return measured(grids.start(grid, settings), grids.train_step)


def assert_close(results, expected):
    for result in results:
        assert result == results[0]  # the same bits on all ranks
        for own, exact in zip(result, expected, strict=True):
            assert [one is None for one in own] == [one is None for one in exact]
            assert [one for one in own if one is not None] == pytest.approx([one for one in exact if one], **CLOSE)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("method", ["GaLore", "AdaRankGrad", "GradNormLoRP"])
def test_metrics_are_those_of_one_process(ranks, stage, method):
    assert_close(run_ranks(ranks, measure_flat, config(stage, ranks, method=method)), dense(method))


def test_weight_decay_counts_as_an_update():
    settings = config(3, 2, params={"weight_decay": 0.1})
    assert_close(run_ranks(2, measure_flat, settings), dense("GaLore", weight_decay=0.1))


GRIDS = [Grid(1, 2, 1, 0), Grid(2, 2, 1, 3, "autotp"), Grid(1, 1, 2, 0), Grid(1, 2, 2, 1)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_metrics_on_a_grid_are_those_of_one_process(grid):
    assert_close(run_ranks(grid.world, measure_grid, grid, settings_of(grid)), dense_on_grid("GaLore"))


def test_shards_with_local_projections_are_matrices_of_their_own():
    grid = Grid(1, 2, 1, 0)
    settings = settings_of(grid, params={"tensor_parallel_projection": "local"})
    assert_close(run_ranks(2, measure_grid, grid, settings), expected_of(ShardOracle(2, "GaLore")))


@pytest.mark.parametrize(("ranks", "method"), [(1, "GaLore"), (2, "GaLore"), (2, "AdaRankGrad")])
def test_under_projected_reduction_energy_is_given_where_somebody_has_the_whole_gradient(ranks, method):
    settings = config(0, ranks, gas=2, method=method, params={"reduction": "projected"})
    results = run_ranks(ranks, measure_flat, settings)
    if ranks > 1 and method == "GaLore":  # each rank has a gradient of its own
        assert {energy for result in results for *energies, _ in result for energy in energies} == {None}
        assert [ratio for *_, ratio in results[0]] == pytest.approx([ratio for *_, ratio in dense(method)], **CLOSE)
    else:
        assert_close(results, dense(method))


def weights_with_and_without(settings):
    """The weights after some steps, with every step measured and with none."""
    import ds_lowrank
    from tests.engines.scenario import full_weights

    found = []
    for watched in (True, False):
        engine = ds_lowrank.initialize(model=make_model(), config=settings)[0]
        if watched:
            measured(engine, train_step)
        else:
            for step in range(STEPS):
                train_step(engine, step)
        found.append(full_weights(engine))
    return all(torch.equal(found[0][name], found[1][name]) for name in found[1])


@pytest.mark.parametrize("stage", [0, 2])
def test_measuring_changes_no_bit(stage):
    settings = config(stage, 2, "bf16", params={"master_weights": stage == 2})
    assert run_ranks(2, weights_with_and_without, settings) == [True, True]


SPLIT = "model.layers.1.self_attn.o_proj.weight"


def has_copies_or_is_split(name):
    return "embed_tokens" in name or name == SPLIT


class OracleOfCopies(ShardOracle):
    """The oracle that projects a whole embedding, and each shard of one other matrix."""

    def __init__(self, ranks):
        GridOracle.__init__(self, 0.0, dense_model(), projected=has_copies_or_is_split)
        self.ranks, self.dims = ranks, {SPLIT: 1}
        whole = self.rules.pop(SPLIT).weight
        for shard, part in self.shards(SPLIT, whole):
            self.rules[shard] = DENSE["GaLore"](part, name=shard, **METHODS["GaLore"])


def measure_with_copies(grid, settings):
    engine = grids.start(grid, settings)
    found = measured(engine, grids.train_step)
    assert [slot.tag.name for slot in engine.basic_optimizer.slots if slot.is_projected and slot.copies > 1] == [
        "model.embed_tokens.weight"
    ]
    return found


@pytest.mark.parametrize("projection", ["logical", "local"])
@pytest.mark.parametrize("grid", [Grid(1, 2, 1, 0, "autotp"), Grid(2, 2, 1, 3, "autotp")], ids=str)
def test_a_matrix_of_which_tensor_parallel_ranks_have_copies_counts_once(grid, projection):
    """AutoTP leaves the embedding whole on every rank; the other matrix shows whether its copies count more."""
    globs = ["*embed_tokens*", f"*{SPLIT.removesuffix('.weight').removeprefix('model.')}*"]
    settings = settings_of(grid, params={"target_modules": globs, "tensor_parallel_projection": projection})
    oracle = OracleOfCopies(2)
    if projection == "logical":
        oracle = GridOracle(0.0, dense_model(), projected=has_copies_or_is_split)
    assert_close(run_ranks(grid.world, measure_with_copies, grid, settings), expected_of(oracle))
