"""A method is one file: what finds it, what the tests say of it, and what its optimizer class documents."""

from __future__ import annotations

import ast
import importlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_origin

import pytest
import torch

import ds_lowrank
from benchmarks.gpu.cases import tagged
from ds_lowrank.methods import METHODS
from ds_lowrank.methods.base import Method, Options
from ds_lowrank.optimizer import lineage, optimizers, param_groups
from ds_lowrank.optimizer.optimizer import LowRankOptimizer
from ds_lowrank.optimizer.registry import OPTIMIZERS
from ds_lowrank.reference import DENSE
from ds_lowrank.reference.sketch import sketch
from tests.methods import what_to_add
from tests.rows import ROWS

ROOT = Path(__file__).parents[2]
PACKAGED = sorted(name for name, method in METHODS.items() if method.__module__.startswith("ds_lowrank."))

RANDOM_MOMENTUM = '''
"""Momentum in a fixed random subspace: a whole method, in one file."""

from __future__ import annotations

from ds_lowrank.linalg.sketch import normal
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.subspace import project_on
from ds_lowrank.sharding.updates import Factors


class RandomMomentumOptions(Options):
    """The keys of RandomMomentum."""

    rank: int = 4


class RandomMomentum(Method):
    """Momentum in a fixed random subspace, on the matrices of a stack."""

    name = "RandomMomentum"
    Options = RandomMomentumOptions

    @staticmethod
    def state(shard, options, rank):
        """The momentum, kept x rank for each matrix."""
        return {"momentum": options.first_moment_spec(shard.kept, rank)}

    @staticmethod
    def project(shard, state, options):
        """Project on the subspace: ``R = H Q``."""
        rank = RandomMomentum.rank(shard.shape, options)
        rows, columns = (0, shard.compressed.size), (0, rank)
        drawn = normal(options.seed, shard.names, 0, rows, columns, shard.device)
        return (yield from project_on(shard, shard.compressed.own(drawn), False, options))

    @staticmethod
    def update(shard, state, options, found):
        """Update the momentum, and descend along ``M Q^T / r``."""
        state["momentum"].lerp_(found.projected, 0.1)
        direction = yield shard.kept.all_gather(state["momentum"])
        return Factors(direction, found.basis, 1 / found.basis.shape[2])
'''


@pytest.fixture
def random_momentum(tmp_path, monkeypatch):
    """The method, imported from a folder of its own and registered during one test."""
    (tmp_path / "random_momentum.py").write_text(RANDOM_MOMENTUM)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("random_momentum").RandomMomentum
    METHODS.pop("RandomMomentum")
    del sys.modules["random_momentum"]


def test_method_from_outside_has_an_optimizer_that_trains(random_momentum):
    assert len(RANDOM_MOMENTUM.splitlines()) < 50
    assert OPTIMIZERS["RandomMomentum"].method is random_momentum
    assert ds_lowrank.RandomMomentum is OPTIMIZERS["RandomMomentum"]
    assert pickle.loads(pickle.dumps(ds_lowrank.RandomMomentum)) is ds_lowrank.RandomMomentum
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(7, 5))
    optimizer = ds_lowrank.RandomMomentum([("w", weight)], lr=0.1, rank=2)
    weight.grad = torch.randn(7, 5)
    optimizer.step()
    Q = sketch(0, "w", 0, 5, 2)
    assert torch.allclose(weight, -0.1 * 0.1 * weight.grad @ Q @ Q.T / 2, atol=1e-6)


def test_second_method_of_a_name_is_refused_and_both_are_named(random_momentum):
    with pytest.raises(TypeError, match=r"random_momentum\.RandomMomentum and .*test_registry\..*Another"):

        class Another(Method):
            name = "RandomMomentum"

    assert METHODS["RandomMomentum"] is random_momentum


def test_misspelt_optimizer_is_refused_with_the_nearest_name():
    with pytest.raises(AttributeError, match="did you mean 'GaLore'"):
        _ = ds_lowrank.Galor
    assert "RandomMomentum" not in OPTIMIZERS


LEVELS = {
    "tests/contract": 74,
    "tests/simulated/test_methods.py::test_every_option_matches_reference": 4,
    "tests/engines/test_methods_engines.py": 12,
    "tests/unit/test_fused_training.py": 4,
    "tests/unit/test_costs.py": 4,
}
"""Some tests of each level, and how many cases a method without a row has in them."""


def run_levels(folder):
    """Run these cases in a process that has imported the method: the verdict of each, and the errors."""
    (folder / "random_momentum.py").write_text(RANDOM_MOMENTUM)
    options = ["-v", "--tb=line", "-p", "random_momentum", "-p", "no:cacheprovider", "-k", "RandomMomentum or in_each"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", *options, *LEVELS]
    report = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    verdicts = dict(re.findall(r"^(tests/\S+(?: .*\])?) (PASSED|FAILED)", report, re.M))
    return verdicts, set(re.findall(r"^\S+:\d+: (\w+: .*)", report, re.M))


@pytest.mark.slow
def test_method_without_a_row_is_run_at_every_level_or_says_what_to_add(tmp_path):
    """Only comparing it needs a reference. One message says what the tests lack, one per table what the docs lack."""
    verdicts, errors = run_levels(tmp_path)
    assert {level: sum(case.startswith(level) for case in verdicts) for level in LEVELS} == LEVELS

    def found(*levels):
        return {verdict for case, verdict in verdicts.items() if case.startswith(levels)}

    assert found("tests/contract", "tests/unit/test_fused", "tests/unit/test_costs.py::test_rounds") == {"PASSED"}
    assert found("tests/simulated", "tests/engines", "tests/unit/test_costs.py::test_every") == {"FAILED"}
    of_docs = {error for error in errors if "docs/methods.md" in error}
    assert errors - of_docs == {f"LookupError: {what_to_add('RandomMomentum')}"}
    assert len(of_docs) == 3 and all("add a row" in error for error in of_docs)


@pytest.mark.parametrize("name", PACKAGED)
def test_every_method_of_the_package_has_a_row_and_a_reference(name):
    assert name in ROWS and name in DENSE, what_to_add(name)


def test_no_row_or_reference_is_left_of_a_method_that_is_gone():
    assert ROWS.keys() == DENSE.keys() == set(PACKAGED)


def documented_arguments(cls):
    """The entries of ``Args:`` in a class docstring, each as one line."""
    section = re.search(r"\n    Args:\n(.*?)(?:\n    \S|\Z)", cls.__doc__, re.S)[1]
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, re.M)
    return {key: " ".join(text.split()) for key, text in entries}


def documented_default(text, field):
    """The choice before ``the default``, or the value after the last semicolon."""
    if get_origin(field.annotation) is Literal:
        quoted = re.findall(r"``(\w+)``", text.split("the default")[0])
        return [word for word in quoted if word in field.annotation.__args__][-1]
    last = text.removesuffix(".").rpartition("; ")[2]
    return ast.literal_eval(re.match(r"\([^)]*\)|\S+", last)[0])


def assert_documented(documented, fields, defaults):
    assert documented.keys() == fields.keys()
    for key, text in documented.items():
        assert documented_default(text, fields[key]) == getattr(defaults, key), key


@pytest.mark.parametrize("name", PACKAGED)
def test_optimizer_class_documents_the_options_of_its_method(name):
    """Its own, and common ones whose default it changes; in both, the default."""
    kind, common = METHODS[name].Options, Options.model_fields
    own = {k: f for k, f in kind.model_fields.items() if k not in common or f.default != common[k].default}
    assert OPTIMIZERS[name] is getattr(optimizers, name, None) or OPTIMIZERS[name] is getattr(lineage, name)
    assert_documented(documented_arguments(OPTIMIZERS[name]), own, kind())


def test_base_class_documents_the_common_options():
    documented = documented_arguments(LowRankOptimizer)
    others = {"params", "grid", "options"}
    assert others <= documented.keys()
    documented = {key: text for key, text in documented.items() if key not in others}
    assert_documented(documented, Options.model_fields, Options())


def test_options_are_validated_once_per_group(monkeypatch):
    """On the 291 parameters of a LLaMA of 32 layers: not again by bind(), nor by a scheduler's learning rates."""
    matrices = [f"{part}_proj.weight" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    layer = [(name, (8, 8)) for name in matrices] + [("input_norm.weight", (8,)), ("post_norm.weight", (8,))]
    shapes = [(f"model.layers.{i}.{name}", shape) for i in range(32) for name, shape in layer]
    shapes += [("model.embed_tokens.weight", (9, 8)), ("model.norm.weight", (8,)), ("lm_head.weight", (9, 8))]
    named = [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes]
    tagged(dict(named))
    assert len(named) == 291
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim == 2], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.ndim == 1]},
    ]
    calls, parse = [], param_groups.parse_options
    monkeypatch.setattr(param_groups, "parse_options", lambda *given: calls.append(given) or parse(*given))
    optimizer = ds_lowrank.GaLore(groups, rank=2, lr=0.1)
    assert len(calls) == 2
    optimizer.bind()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(5):
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
    assert len(calls) == 2
    assert {options.lr for options in optimizer.options.values()} == {0.1 / 6}
