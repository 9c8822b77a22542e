"""A step costs what the documentation says: state, rounds and volume of every method, buckets of many matrices."""

from __future__ import annotations

import contextlib
from fractions import Fraction
from typing import Literal, get_args, get_origin

import pytest
import torch

import ds_lowrank
from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer import stacks
from ds_lowrank.sharding.layout import length
from ds_lowrank.sharding.reduce import SingleProcess
from tests.methods import of
from tests.simulated.harness import ShardedMatrix, flat_parts, state_elements
from tests.unit.pages import PAGES, ROOT, rows, rows_by_method, state_rows, weights

EXTRA = [
    ("GaLore", {"inner": "sgd", "momentum": 0.9}),
    ("GaLore", {"cos_threshold": 0.4, "moments": "rotate"}),
    ("GaLore", {"inner": "lion", "lion_sign": "original"}),
    ("GaLore", {"projector": "svd", "proj_type": "left"}),
    ("OnlineSubspaceDescent", {"inner": "sgd", "momentum": 0.9}),
    ("OnlineSubspaceDescent", {"inner": "lion", "lion_sign": "original"}),
    ("OnlineSubspaceDescent", {"pca_lambda": 0.0, "basis_weight_decay": 0.1}),
    ("VLoRP", {"left_view": "official", "proj_type": "left"}),
    ("VLoRP", {"granularity": "1/2"}),
    ("Apollo", {"mini": True, "norm_growth_limit": None}),
    ("GradNormLoRP", {"parametrization": "adapter", "adapter_rank": 4, "adapter_dropout": 0.1}),
    ("GradNormLoRP", {"projector": "svd", "norm_axis": "input"}),
    ("Lorenza", {"rank": None}),
    ("Lorenza", {"orthogonal_component": True, "orthogonal_scale": "norm_ratio"}),
    ("Lorenza", {"probe_form": "gaussian", "moment_on_refresh": "keep"}),
]
"""Options that a list of single changes does not reach."""


def even_world(method, shape, ranks=3, **options):
    """One matrix in even shares, with a refresh at step 3."""
    numel = shape[0] * shape[1]
    cuts = [numel * rank // ranks for rank in range(1, ranks)]
    return ShardedMatrix(method, torch.zeros(shape), flat_parts(shape, cuts), **of(method).cost_options(options))


def cost_of_each_step(sharded, steps):
    """The rounds of every step, and the elements that each rank sent."""
    costs = []
    for _ in range(steps):
        rounds, sent = sharded.world.rounds, sharded.world.bytes_sent.copy()
        sharded.step(torch.randn(sharded.weight.shape))
        elements = [(after - before) // 4 for after, before in zip(sharded.world.bytes_sent, sent, strict=True)]
        costs.append((sharded.world.rounds - rounds, elements))
    return costs


def single_changes(method):
    """Every choice of every option that has choices, alone, where it contradicts no default."""
    options = METHODS[method].Options
    fields = options.model_fields.items()
    choices = {key: get_args(field.annotation) for key, field in fields if get_origin(field.annotation) is Literal}
    choices.pop("reduction")  # another world, which has a test of its own
    # stagger moves a refresh to another step.
    choices |= {key: (False, True) for key, field in fields if field.annotation is bool and key != "stagger"}
    for key, value in ((key, value) for key, values in choices.items() for value in values):
        with contextlib.suppress(ValueError):
            options(**{key: value})
            yield {key: value}


def every_choice():
    """The rows of the table, and every choice that has no row because it changes nothing."""
    cases = [(method, options) for method, options, _ in rows_by_method("### Rounds")]
    documented = list(dict.fromkeys(method for method, _ in cases))
    cases += [(method, change) for method in documented for change in single_changes(method)]
    return list({str(case): case for case in cases + EXTRA}.values())


def documented_rounds(method, options):
    """The rounds of the row that has the most of these options, and no others."""
    fitting = [(known, cells) for name, known, cells in rows_by_method("### Rounds") if name == method]
    fitting = [(known, cells) for known, cells in fitting if known.items() <= options.items()]
    return max(fitting, key=lambda row: len(row[0]))[1]


@pytest.mark.parametrize(("method", "options"), every_choice(), ids=str)
def test_rounds_are_as_documented(method, options):
    first, ordinary, refresh = documented_rounds(method, options)
    costs = [rounds for rounds, _ in cost_of_each_step(even_world(method, (48, 20), **options), steps=5)]
    fourth = ordinary if refresh == "-" else refresh
    assert costs == [int(rounds) for rounds in (first, ordinary, ordinary, fourth, ordinary)]


@pytest.mark.parametrize("heading", ["### State", "### Rounds", "### Volume"])
def test_every_method_has_a_row_in_each_table_of_costs(heading):
    missing = METHODS.keys() - {method for method, _, _ in rows_by_method(heading)}
    assert not missing, f"docs/methods.md, {heading}: add a row with options {{}} for {', '.join(sorted(missing))}"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_rounds_do_not_depend_on_the_shape(method):
    tall, wide = (cost_of_each_step(even_world(method, shape), steps=4) for shape in ((48, 20), (20, 48)))
    assert [rounds for rounds, _ in tall] == [rounds for rounds, _ in wide]


@pytest.mark.parametrize(("method", "options", "formula"), state_rows(), ids=str)
@pytest.mark.parametrize("shape", [(48, 20), (20, 48)])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_state_is_as_documented(ranks, method, options, formula, shape, proj_type):
    """Elements over all ranks; a projection that a seed gives back is not among them."""
    sharded = even_world(method, shape, ranks, proj_type=proj_type, **options)
    sides = sorted(shape, reverse=proj_type == "std")
    known = {
        "m": shape[0],
        "n": shape[1],
        "D": sides[0],
        "d": sides[1],
        "r": sharded.method.rank(shape, sharded.options),
    }
    known["c"] = Fraction(getattr(sharded.options, "granularity", 1))
    expected = eval(formula, known)
    assert sharded.state_stores[0].numel == state_elements(sharded) == expected
    sharded.step(torch.randn(shape))
    assert state_elements(sharded) == expected


@pytest.mark.parametrize(("method", "options", "cells"), rows_by_method("### Volume"), ids=str)
@pytest.mark.parametrize("shape", [(1024, 512), (512, 1024)])
def test_volume_at_zero_3_is_as_documented(method, options, cells, shape):
    ranks, wide = 8, shape[0] < shape[1]
    sharded = even_world(method, shape, ranks, **options)
    r, c = sharded.method.rank(shape, sharded.options), int(getattr(sharded.options, "granularity", 1))
    known = {"r": r, "c": c, "W": ranks, "d": min(shape), "D": max(shape)}
    expected = eval(cells[wide].strip("`"), known) * shape[1] * (ranks - 1) / ranks
    rounds, sent = cost_of_each_step(sharded, steps=2)[1]
    for one in [sum(sent) / ranks] if "W" in cells[wide] else sent:
        assert 0 <= one - expected <= 8 * max((r + 2) ** 2, rounds)


ROUNDS = {
    "ordinary": ({}, 1),
    "refresh, `randomized`": ({}, 0),
    "refresh, `svd`": ({"projector": "svd"}, 0),
}


def without_decision(cost):
    """The costs without those of the decision: one round, and one number to every other rank."""
    rounds, sent = cost
    return rounds - 1, [elements - len(sent) + 1 for elements in sent]


def formula(shards, rank, kind, root):
    """What docs/communication.md says that a rank sends, in elements."""
    r, first, others = 4, rank == root, [j for j in range(len(shards)) if j != root]

    def held(axis, i):
        lo, hi = getattr(shards[i], axis).held
        return hi - lo

    def owned(axis, i):
        return length(getattr(shards[i], axis).owned)

    def copies(axis):
        spans = getattr(shards[rank], axis).owned
        peers = [getattr(shards[j], axis).held for j in range(len(shards)) if j != rank]
        return sum(max(0, min(b, d) - max(a, c)) for a, b in spans for c, d in peers)

    shared = {axis: held(axis, rank) - owned(axis, rank) for axis in ("kept", "compressed")}
    ordinary = copies("compressed") + shared["kept"] + copies("kept")
    if kind == "ordinary":
        return r * ordinary
    if kind == "refresh, `svd`":
        low, high = shards[rank].part.rows
        handed = r * sum(owned("compressed", j) for j in others)
        return r * ordinary + (handed if first else (high - low) * shards[rank].shape[1])
    handed = sum(owned("kept", j) + owned("compressed", j) for j in others)
    collected = owned("kept", rank) + owned("compressed", rank)
    again = shared["kept"] + copies("kept") + shared["compressed"]
    return r * (ordinary + again + (handed if first else collected))


@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("shape", [(48, 20), (20, 48)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_rounds_and_volumes_are_as_documented(kind, shape, ranks):
    documented = dict(rows("communication", "## What one step exchanges"))
    changes, step = ROUNDS[kind]
    sharded = even_world("GaLore", shape, ranks, **changes)
    rounds, sent = without_decision(cost_of_each_step(sharded, step + 1)[step])
    shards = [sharded.shard(rank) for rank in range(ranks)]
    (root,) = {matrix.member.root for matrix in sharded.matrices}
    assert rounds == int(documented[kind])
    assert sent == [formula(shards, rank, kind, root) for rank in range(ranks)]


@pytest.mark.parametrize("changes", [{}, {"projector": "svd"}], ids=str)
def test_rotation_costs_what_is_documented(changes):
    documented = dict(rows("communication", "## What one step exchanges"))
    (plain, sent), (rotated, more) = (
        cost_of_each_step(even_world("GaLore", (48, 20), moments=moments, **changes), steps=4)[3]
        for moments in ("keep", "rotate")
    )
    assert rotated - plain == int(documented["refresh after the first with `moments: rotate`, on top"])
    r, world, dealt = 4, 3, (1, 2, 1)
    assert [a - b for a, b in zip(more, sent, strict=True)] == [r * (r + (world - 2) * own) for own in dealt]


class Counting(SingleProcess):
    """Counts collectives."""

    def __init__(self):
        self.rounds = 0

    def exchange(self, requests):
        self.rounds += 1
        return super().exchange(requests)


def collectives(gradients, shapes=((8, 8),) * 3):
    """The collectives of each call of ``step`` on matrices at rank 2; a gradient is one number everywhere."""
    named = weights(*shapes)
    optimizer = ds_lowrank.GaLore(named, rank=2, update_proj_gap=2)
    optimizer._executor = executor = Counting()
    counts = []
    for gradient in gradients:
        for _, weight in named:
            weight.grad = torch.full_like(weight, gradient)
        before = executor.rounds
        optimizer.step()
        counts.append(executor.rounds - before)
    return counts


def test_decision_and_zero_gradient_cost_what_is_documented():
    documented = {kind: int(rounds) for kind, rounds in rows("communication", "## What one step exchanges")}
    decision, ordinary = documented["decision: one number a parameter"], documented["ordinary"]
    refresh, zero = (
        documented["refresh, `randomized`"],
        documented["a refresh that meets a projected gradient of zeros, on top"],
    )
    assert collectives([1, 1, 0, 0]) == [
        refresh + decision,
        ordinary + decision,
        refresh + decision + zero,
        ordinary + decision,
    ]
    text = " ".join(PAGES["communication"].split())
    assert f"a step costs {ordinary + decision} collectives" in text
    assert f"a step with a randomized refresh {refresh + decision}," in text


@pytest.mark.parametrize(("room", "count"), [(1, 3), (48, 3), (96, 2), (144, 1)])
def test_buckets_cost_what_is_documented(monkeypatch, room, count):
    """Each of the three matrices takes 2 (2 * 8 + 8) = 48 numbers of the room."""
    text = " ".join(PAGES["communication"].split())
    assert "`BUCKET_ELEMENTS` = 2^28" in text
    assert stacks.BUCKET_ELEMENTS == 2**28
    monkeypatch.setattr(stacks, "BUCKET_ELEMENTS", room)
    assert "3 w + 1 and 10 w + 1" in text
    assert collectives([1, 1]) == [10 * count + 1, 3 * count + 1]


def test_a_stack_is_cut_where_a_bucket_is_full(monkeypatch):
    """Three matrices of 48 numbers and three of 40 in buckets of 104: 2 * 48, then 48 + 40, then 2 * 40."""
    monkeypatch.setattr(stacks, "BUCKET_ELEMENTS", 104)
    assert collectives([1, 1], [(8, 8)] * 3 + [(8, 4)] * 3) == [10 * 3 + 1, 3 * 3 + 1]


@pytest.mark.parametrize(("rank", "saved"), [(128, 0.945), (1024, 0.712)])
def test_gradnormlorp_in_int8_saves_the_documented_share_at_7b(rank, saved):
    """Below AdamW in bf16, counting all tensors of the state, of the matrices and of the rest; 89.5 % are published."""
    from ds_lowrank.models import llama
    from ds_lowrank.optimizer.report import state_bytes

    with torch.device("meta"):
        model = llama.LlamaForCausalLM(llama.load_config(ROOT / "ds_configs/models/llama_7b.json"))
    optimizer = ds_lowrank.GradNormLoRP(model, rank=rank, state_dtype="int8")
    adamw = 2 * 2 * sum(parameter.numel() for parameter in model.parameters())
    assert 1 - sum(state_bytes(optimizer.slots)) / adamw == pytest.approx(saved, abs=5e-4)
