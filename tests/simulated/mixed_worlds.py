"""Worlds of matrices that have little in common: shapes, cuts, places in memory, dtypes, groups, copies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ds_lowrank.methods import METHODS
from ds_lowrank.methods.galore import refresh_due
from ds_lowrank.optimizer.matrices import Matrices
from ds_lowrank.optimizer.stacks import Stacks
from ds_lowrank.optimizer.step import step_matrices
from ds_lowrank.placement.fragment import Fragment
from ds_lowrank.reference import DenseGaLore, DenseGradNormLoRP, DenseLorenza
from ds_lowrank.sharding.layout import EMPTY
from ds_lowrank.sharding.world import SimulatedWorld
from tests.methods import dense, of
from tests.simulated.harness import ROUNDING

SHAPES = [(12, 24), (24, 12), (18, 30)]
"""Every side is at least twice the largest rank, so that a sketch is well conditioned; all are multiples of six."""
BOUNDS = {torch.float32: ROUNDING, torch.bfloat16: 1e-3}
"""In bf16 a few of some hundred elements may be on the boundary of their rounding, and then
differ by 4e-3 of themselves; what is rounded is the same at the beginning of each step."""
OF_STORAGE = ("state_dtype", "basis_placement", "stagger")
"""Options that references do not know."""


@dataclass
class Layer:
    """One matrix of a mixed world.

    Attributes:
        name: of the matrix.
        shape: as it is stored.
        parts: what each rank holds.
        options: the options of its group; layers of one group have the same dict.
        place: ``own`` for a parameter of its own, ``flat`` for a flat store that all such layers of a rank are in, and
            ``fused`` for two spans of a store of its own.
        dtype: of its weights and gradients; those in a flat store are fp32.
        transposed: whether it is stored input x output.
        peers: the ranks that share this copy; None for all.
    """

    name: str
    shape: tuple[int, int]
    parts: list
    options: dict[str, Any]
    place: str = "own"
    dtype: torch.dtype = torch.float32
    transposed: bool = False
    peers: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.peers is not None:
            self.parts = [part if rank in self.peers else EMPTY for rank, part in enumerate(self.parts)]

    def oriented(self, matrix):
        """A matrix as the layer stores it as the reference has it, or the reverse."""
        return matrix.T if self.transposed else matrix

    def is_on(self, rank):
        """Whether a rank takes part in its steps."""
        return self.peers is None or rank in self.peers


@dataclass
class RankStores:
    """Where one rank keeps its elements of all layers.

    Attributes:
        fragments: by layer.
    """

    fragments: list[Fragment] = field(default_factory=list)

    def __init__(self, layers, rank):
        ends, end = [], 1  # an element that belongs to no matrix
        for layer in layers:
            end += layer.parts[rank].numel if layer.place == "flat" else 0
            ends.append(end)
        flat = torch.nn.Parameter(torch.zeros(end, dtype=torch.float32))
        flat.grad = torch.zeros_like(flat)
        self.fragments = []
        for layer, end in zip(layers, ends, strict=True):
            numel = layer.parts[rank].numel
            if layer.place == "flat":
                self.fragments.append(Fragment(flat, ((end - numel, end),)))
                continue
            first, gap = (numel // 3, 5) if layer.place == "fused" else (0, 0)
            store = torch.nn.Parameter(torch.zeros(numel + gap, dtype=layer.dtype))
            store.grad = torch.zeros_like(store)
            spans = ((0, numel),) if layer.place == "own" else ((0, first), (first + gap, numel + gap))
            self.fragments.append(Fragment(store, tuple(span for span in spans if span[0] < span[1]) or ((0, 0),)))


class MixedWorld:
    """Layers that are stepped together on every rank or, for comparison, each with stacks of its own.

    Attributes:
        weights: of every layer, as it is stored; gathered after each step.
        rounds: of the last step.
    """

    def __init__(self, method, layers, starts, ranks, together=True):
        self.method, self.layers, self.ranks = METHODS[method], layers, ranks
        self.weights = [layer.oriented(start).to(layer.dtype) for layer, start in zip(layers, starts, strict=True)]
        groups = {id(layer.options): self.method.Options(**layer.options) for layer in layers}
        stores = [RankStores(layers, rank) for rank in range(ranks)]
        self.matrices = []  # by rank, by layer; None where a rank takes no part
        for rank in range(ranks):
            builder = Matrices(self.method, rank)
            self.matrices.append(
                [
                    builder.projected(
                        layer.name,
                        layer.shape,
                        layer.parts,
                        groups[id(layer.options)],
                        fragment,
                        id(layer.options),
                        layer.peers,
                        layer.transposed,
                    )
                    if layer.is_on(rank)
                    else None
                    for layer, fragment in zip(layers, stores[rank].fragments, strict=True)
                ]
            )
            builder.make_states()
        everything = [range(len(layers))]
        self.units = everything if together else [[i] for i in range(len(layers)) if layers[i].peers is None]
        self.units += [] if together else [[i for i in range(len(layers)) if layers[i].peers is not None]]
        self.stacks = [[Stacks(self.method) for _ in range(ranks)] for _ in self.units]
        self.world, self.rounds = SimulatedWorld(ranks), 0
        for i, weight in enumerate(self.weights):
            self._write(i, weight, "data")

    def _write(self, i, whole, attribute):
        for rank, matrices in enumerate(self.matrices):
            if matrices[i] is not None and self.layers[i].parts[rank].numel:
                fragment = matrices[i].fragment
                flat = getattr(fragment.store, attribute)
                cut = [
                    whole[r.row : r.row + r.height, r.col : r.col + r.width].reshape(-1)
                    for r in self.layers[i].parts[rank].rectangles
                ]
                sizes = [end - start for start, end in fragment.spans]
                for (start, end), values in zip(fragment.spans, torch.cat(cut).split(sizes), strict=True):
                    flat[start:end] = values

    def _gather(self, i):
        for rank, matrices in enumerate(self.matrices):
            if matrices[i] is not None and self.layers[i].parts[rank].numel:
                flat = matrices[i].fragment.weights
                for r in self.layers[i].parts[rank].rectangles:
                    values = flat[r.offset : r.offset + r.height * r.width].view(r.height, r.width)
                    self.weights[i][r.row : r.row + r.height, r.col : r.col + r.width] = values

    def step(self, gradients):
        """Step the layers that have a gradient, m x n as the reference has it; whether the step was skipped."""
        before = self.world.rounds
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        for i in present:
            self._write(i, self.layers[i].oriented(gradients[i]).to(self.layers[i].dtype), "grad")
        skipped = False
        for unit, stacks in zip(self.units, self.stacks, strict=True):
            stepped = [i for i in unit if i in present]
            if not stepped:
                continue
            reports = self.world.run(
                [
                    step_matrices(
                        self.method,
                        [self.matrices[rank][i] for i in stepped if self.matrices[rank][i] is not None],
                        self.ranks,
                        stacks=stacks[rank],
                    )
                    for rank in range(self.ranks)
                ]
            )
            skipped |= any(report.skipped for report in reports)
        for i in present:
            self._gather(i)
        self.rounds = self.world.rounds - before
        return skipped

    def replace_states(self):
        """Replace every tensor of every state by a copy, as loading a checkpoint does."""
        for state in self.states():
            state |= {key: value.clone() for key, value in state.items() if torch.is_tensor(value)}

    def states(self):
        """The states of all matrices on all ranks."""
        return [matrix.state for matrices in self.matrices for matrix in matrices if matrix is not None]

    def snapshot(self):
        """Copies of all weights, and of all states."""
        states = [
            {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}
            for state in self.states()
        ]
        return [weight.clone() for weight in self.weights], states


def assert_same_bits(one, other):
    """Compare two snapshots."""
    for a, b in zip(one[0], other[0], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one[1], other[1], strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert torch.equal(value, b[key]) if torch.is_tensor(value) else value == b[key], key


class Reference:
    """The dense reference of a layer, with what the optimizer adds: it waits, and keeps a basis where G is zero."""

    def __init__(self, method, layer, start):
        options = {key: value for key, value in layer.options.items() if key not in OF_STORAGE}
        self.layer, self.options = layer, METHODS[method].Options(**layer.options)
        self.dense = dense(method)(start.to(layer.dtype).float(), name=layer.name, **options)
        self.steps = 0

    def step(self, gradient):
        """Take one step; none before the first gradient that is not zero."""
        if gradient is None or not (self.steps or gradient.any()):
            return
        inner = getattr(self.dense, "galore", self.dense)
        gradient = gradient.to(self.layer.dtype).float()
        if isinstance(inner, DenseLorenza):
            gap = inner.gap
            inner.gap = 1 if self.steps % gap == 0 and gradient.any() else 10**9
            self.dense.step(gradient)
            inner.gap = gap
        else:
            if isinstance(inner, DenseGaLore) and self.options.stagger:
                inner.next_refresh = inner.t if refresh_due(self.layer.name, self.options, self.steps) else -1
            self.dense.step(gradient)
        self.steps += 1

    def error(self, weight):
        """The difference of the layer's weight, relative to the reference's; then start from the rounded weight."""
        exact = self.dense.weight
        rounded = exact.to(weight.dtype).float()
        error = (self.layer.oriented(weight).float() - rounded).norm() / exact.norm().clamp_min(1e-30)
        if weight.dtype != torch.float32:
            exact.copy_(self.layer.oriented(weight))
            if isinstance(self.dense, DenseGradNormLoRP):  # a direction is that of the weight, its length is state
                unit = exact / self.dense.norm(exact)
                self.dense.v = self.dense.norm(self.dense.v) * self.dense.g.sign() * unit
        return error.item()


def starts_for(method, layers):
    """The weights that layers start with, as references have them; copies with the same."""
    found = {}
    for number, layer in enumerate(layers):
        torch.manual_seed(10**6 + number)  # no gradient is drawn from this seed
        found.setdefault(layer.name, of(method).start(layer.shape[::-1] if layer.transposed else layer.shape))
    return [found[layer.name].clone() for layer in layers]
