"""One matrix over the ranks of a simulated world, stepped as the product steps it, next to its dense reference."""

from __future__ import annotations

import itertools

import torch

from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.matrices import Matrices
from ds_lowrank.optimizer.step import step_matrices
from ds_lowrank.placement.fragment import Fragment
from ds_lowrank.sharding.layout import Block, ContiguousPart
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import lockstep
from ds_lowrank.sharding.world import SimulatedWorld
from tests.methods import dense, of

ROUNDING = 3e-6
"""How far a few steps may end from the dense reference's, as a share of their sum: about 25 eps of fp32.

Ten products follow one another in a step, and each adds up in an order that depends on the layout and on the CPU's
kernels. The worst of all cases is at 1.0e-6 on an AMD EPYC, and at 1.7e-6 on an Intel Xeon with AVX-512.
"""


class ShardedMatrix:
    """One matrix over the parts of a simulated world.

    Attributes:
        weight: the whole matrix; every rank writes its part in each step.
        matrices: as each rank steps it.
        state_stores: how each rank stores its state.
        states: the state of each rank.
    """

    def __init__(self, method, weight, parts, name="w", peers=None, builders=None, **options):
        self.method = METHODS[method]
        self.weight, self.parts, self.options = weight, parts, self.method.Options(**options)
        shape, world = tuple(weight.shape), len(parts)
        assert self.method.unsupported_shape(shape, self.options) is None
        self.peers = range(world) if peers is None else peers
        builders = builders or [Matrices(self.method, rank) for rank in range(world)]
        fragments = [
            Fragment(torch.nn.Parameter(torch.empty(part.numel, dtype=torch.float32, device="cpu")), ((0, part.numel),))
            for part in parts
        ]
        self.matrices = [
            builder.projected(name, shape, parts, self.options, fragment, peers=peers)
            for builder, fragment in zip(builders, fragments, strict=True)
        ]
        for builder in builders:
            builder.make_states()
        self.states = [matrix.state for matrix in self.matrices]
        self.state_stores = [matrix.state_store for matrix in self.matrices]
        self.world = SimulatedWorld(world)

    def cut(self, tensor, part):
        (r0, r1), (c0, c1) = part.block.rows, part.block.cols
        return tensor[r0:r1, c0:c1].reshape(-1)[part.start : part.end].clone()

    def attach(self, gradient):
        for matrix, part in zip(self.matrices, self.parts, strict=True):
            matrix.fragment.store.data = self.cut(self.weight, part)
            matrix.fragment.store.grad = self.cut(gradient, part)

    def shard(self, rank, gradient=None):
        """What a method sees on a rank."""
        matrix = self.matrices[rank]
        shard = MatrixShard(matrix.geometry, [matrix.member])
        flat = torch.empty(shard.part.numel) if gradient is None else self.cut(gradient, shard.part)
        shard.attach([flat], [flat])
        return shard

    def programs(self, gradient):
        """One program per rank: a whole step of this matrix alone."""
        self.attach(gradient)
        return [step_matrices(self.method, [matrix], len(self.parts)) for matrix in self.matrices]

    def step(self, gradient):
        reports = self.world.run(self.programs(gradient))
        self.gather()
        return reports

    def gather(self):
        """Copy what the peers have written into the whole matrix."""
        for rank in self.peers:
            part, flat = self.parts[rank], self.matrices[rank].fragment.weights
            (r0, r1), (c0, c1) = part.block.rows, part.block.cols
            block = self.weight[r0:r1, c0:c1].reshape(-1)
            block[part.start : part.end] = flat
            self.weight[r0:r1, c0:c1] = block.view(r1 - r0, c1 - c0)


def step_together(world, matrices, gradients):
    """One step of several matrices, method by method. A rank takes part in the matrices that it is a peer of."""
    for number, (matrix, gradient) in enumerate(zip(matrices, gradients, strict=True)):
        matrix.attach(gradient)
        for own in matrix.matrices:
            own.member = own.member._replace(number=number)
    for method in dict.fromkeys(matrix.method for matrix in matrices):
        alike = [matrix for matrix in matrices if matrix.method is method]
        own = [[matrix.matrices[rank] for matrix in alike if rank in matrix.peers] for rank in range(world.size)]
        world.run([step_matrices(method, stepped, world.size) for stepped in own])
    for matrix in matrices:
        matrix.gather()


def flat_parts(shape, cuts):
    m, n = shape
    bounds = [0, *sorted(cuts), m * n]
    return [ContiguousPart(Block((0, m), (0, n)), a, b) for a, b in itertools.pairwise(bounds)]


def even_parts(shape, ranks):
    """One part per rank, about equal, with boundaries one element off: inside a row wherever there is one."""
    numel = shape[0] * shape[1]
    return flat_parts(shape, [numel * i // ranks + 1 for i in range(1, ranks)])


def tensor_parallel_parts(shape, split):
    """Four ranks: two unequal halves of the logical matrix, each cut inside a row over two data-parallel ranks."""
    m, n = shape
    halves = (
        [Block((0, m // 2 - 1), (0, n)), Block((m // 2 - 1, m), (0, n))]
        if split == "rows"
        else [Block((0, m), (0, n // 2 - 1)), Block((0, m), (n // 2 - 1, n))]
    )
    return [ContiguousPart(b, lo, hi) for b in halves for lo, hi in ((0, b.numel // 3), (b.numel // 3, b.numel))]


def tensor_blocks(shape, split, ranks):
    """The equal blocks of a matrix whose rows (column-parallel) or columns (row-parallel) are split."""
    m, n = shape
    size = (m if split == "rows" else n) // ranks
    spans = [(t * size, (t + 1) * size) for t in range(ranks)]
    return [Block(span, (0, n)) if split == "rows" else Block((0, m), span) for span in spans]


def grid_order(tensor, data, side_by_side="tensor"):
    """The tensor and the data rank of every rank of a world in which the ranks of one axis are adjacent."""
    if side_by_side == "tensor":
        return [(t, d) for d in range(data) for t in range(tensor)]
    return [(t, d) for t in range(tensor) for d in range(data)]


def grid_parts(blocks, cuts, order):
    """Every rank's part of a matrix whose blocks belong to the tensor ranks, each cut over its data ranks.

    Args:
        blocks: one per tensor rank.
        cuts: for every block, one less than there are data ranks.
        order: the tensor and the data rank of every rank.
    """
    bounds = [[0, *sorted(own), block.numel] for own, block in zip(cuts, blocks, strict=True)]
    return [ContiguousPart(blocks[t], *bounds[t][d : d + 2]) for t, d in order]


def relative_error(method, shape, parts, steps=4, gradients=None, **options):
    """Take some steps of a sharded matrix and of its dense reference.

    Most methods start from zero weights: the error is then that of the summed updates.

    With the usual epsilon Adam's direction is almost a sign: it turns a rounding error of 1e-7 in a projected element
    that happens to be 1e-3 into an error of 1e-4. An epsilon of 0.1 bounds the factor by ten.

    Returns:
        The relative difference of the weights, and the sharded matrix.
    """
    torch.manual_seed(0)
    options = {"lr": 1e-2, "eps": 0.1, **options}
    start = of(method).start(shape)
    reference = dense(method)(start.clone(), **options)
    sharded = ShardedMatrix(method, start, parts, **options)
    gradients = gradients or of(method).gradients_for(shape)
    for step in range(steps):
        gradient = gradients(step)
        reference.step(gradient)
        sharded.step(gradient)
    return ((sharded.weight - reference.weight).norm() / reference.weight.norm()).item(), sharded


def assert_matches_reference(method, shape, parts, bound=ROUNDING, **options):
    """Take some steps and compare the weights with those of the dense reference; the sharded matrix.

    Without a bound of its own, a case's sketches and gradients are well-conditioned.
    """
    error, sharded = relative_error(method, shape, parts, **options)
    assert error < bound, f"{error:.1e}"
    return sharded


def state_elements(sharded):
    """The elements of all ranks' states."""
    return sum(t.numel() for state in sharded.states for t in state.values() if torch.is_tensor(t))


def directions_on(sharded, targets):
    """The directions along which every rank would move its target before the next step."""
    own = [sharded.shard(rank) for rank in range(len(sharded.parts))]
    targets = own if targets is None else targets
    states = [
        {key: value.unsqueeze(0) if torch.is_tensor(value) else value for key, value in state.items()}
        for state in sharded.states
    ]
    programs = [
        lockstep([sharded.method.directions(shard, state, sharded.options, target)])
        for shard, state, target in zip(own, states, targets, strict=True)
    ]
    found = [found for (found,) in SimulatedWorld(len(own)).run(programs)]
    return list(zip(targets, found, strict=True))


def flat(update, shard):
    """This rank's elements of the update of a stack of one, flat."""
    return torch.cat([torch.empty(0), *(update.dense(shard, piece).flatten() for piece in shard.weights.pieces)])
