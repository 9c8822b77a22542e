"""One matrix over the ranks of a simulated world, stepped as the product steps it, beside its dense reference."""

import itertools

import torch

from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.step import SteppedMatrix, shard_matrix, step_matrices
from ds_lowrank.reference import DENSE
from ds_lowrank.sharding.layout import Block, ContiguousPart
from ds_lowrank.sharding.reduce import lockstep
from ds_lowrank.sharding.world import SimulatedWorld


class ShardedMatrix:
    """One matrix over the parts of a simulated world.

    Attributes:
        weight: the whole matrix, of which every rank writes its part in each step.
        shards, state_stores, states: of every rank.
    """

    def __init__(self, method, weight, parts, name="w", peers=None, **options):
        self.method = METHODS[method]
        self.weight, self.parts, self.options = weight, parts, self.method.Options(**options)
        shape, world = tuple(weight.shape), len(parts)
        assert self.method.unsupported_shape(shape, self.options) is None
        self.peers = range(world) if peers is None else peers
        sharded = [shard_matrix(self.method, name, shape, parts, i, self.options, peers=peers) for i in range(world)]
        self.shards, self.state_stores = zip(*sharded, strict=True)
        self.states = [{"step": 0, **store.empty(torch.device("cpu"))} for store in self.state_stores]
        self.world = SimulatedWorld(world)

    def cut(self, tensor, part):
        (r0, r1), (c0, c1) = part.block.rows, part.block.cols
        return tensor[r0:r1, c0:c1].reshape(-1)[part.start : part.end].clone()

    def attach(self, gradient):
        for shard in self.shards:
            shard.attach(self.cut(gradient, shard.part), self.cut(self.weight, shard.part))

    def in_step(self, rank):
        return SteppedMatrix(self.shards[rank], self.state_stores[rank], self.states[rank], self.options)

    def programs(self, gradient):
        """One for every rank: a whole step of this matrix alone."""
        self.attach(gradient)
        return [step_matrices(self.method, [self.in_step(rank)], len(self.parts)) for rank in range(len(self.parts))]

    def step(self, gradient):
        reports = self.world.run(self.programs(gradient))
        self.gather()
        return reports

    def gather(self):
        """Put what the peers have written into the whole matrix."""
        for rank in self.peers:
            part, flat = self.parts[rank], self.shards[rank].weights
            (r0, r1), (c0, c1) = part.block.rows, part.block.cols
            block = self.weight[r0:r1, c0:c1].reshape(-1)
            block[part.start : part.end] = flat
            self.weight[r0:r1, c0:c1] = block.view(r1 - r0, c1 - c0)


def step_together(world, matrices, gradients):
    """One step of several matrices, method by method. A rank takes part in those of which it is a peer."""
    for matrix, gradient in zip(matrices, gradients, strict=True):
        matrix.attach(gradient)
    for method in dict.fromkeys(matrix.method for matrix in matrices):
        alike = [matrix for matrix in matrices if matrix.method is method]
        own = [[matrix.in_step(rank) for matrix in alike if rank in matrix.peers] for rank in range(world.size)]
        world.run([step_matrices(method, stepped, world.size) for stepped in own])
    for matrix in matrices:
        matrix.gather()


def flat_parts(shape, cuts):
    m, n = shape
    bounds = [0, *sorted(cuts), m * n]
    return [ContiguousPart(Block((0, m), (0, n)), a, b) for a, b in itertools.pairwise(bounds)]


def even_parts(shape, ranks):
    """As many parts as ranks, about equal, their boundaries one element off: inside a row wherever there is one."""
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
    """The tensor and the data rank of every rank of a world in which ranks of one of the two stand side by side."""
    if side_by_side == "tensor":
        return [(t, d) for d in range(data) for t in range(tensor)]
    return [(t, d) for t in range(tensor) for d in range(data)]


def grid_parts(blocks, cuts, order):
    """Every rank's part of a matrix of which each tensor rank has a block, cut over its data ranks.

    Args:
        cuts: of every block, one less than there are data ranks.
    """
    bounds = [[0, *sorted(own), block.numel] for own, block in zip(cuts, blocks, strict=True)]
    return [ContiguousPart(blocks[t], *bounds[t][d : d + 2]) for t, d in order]


def relative_error(method, shape, parts, steps=4, gradients=None, **options):
    """Some steps from zero weights: the difference of the summed updates, and the matrix.

    GradNormLoRP starts from others, as it has nothing to norm there, and rewrites a weight as a whole: the difference
    of its weights.

    With the usual epsilon Adam's direction is all but a sign: it turns a rounding error of 1e-7 in a projected element
    that happens to be 1e-3 into an error of 1e-4. One of 0.1 bounds the factor by ten.
    """
    torch.manual_seed(0)
    options = {"lr": 1e-2, "eps": 0.1, **options}
    start = torch.randn(shape) if method == "GradNormLoRP" else torch.zeros(shape)
    dense = DENSE[method](start.clone(), **options)
    sharded = ShardedMatrix(method, start, parts, **options)
    for step in range(steps):
        gradient = torch.randn(shape) if gradients is None else gradients(step)
        dense.step(gradient)
        sharded.step(gradient)
    return ((sharded.weight - dense.weight).norm() / dense.weight.norm()).item(), sharded


def compare(method, shape, parts, bound=1e-6, **options):
    error, sharded = relative_error(method, shape, parts, **options)
    assert error < bound, f"{error:.1e}"
    return sharded


def state_elements(sharded):
    """Over all ranks."""
    return sum(t.numel() for state in sharded.states for t in state.values() if torch.is_tensor(t))


def directions_on(sharded, targets):
    """What every rank is told to move its target along, before the next step."""
    for target, shard in zip(targets, sharded.shards, strict=True):
        target.attach(torch.empty(target.part.numel), torch.empty(0))
        shard.attach(torch.empty(shard.part.numel), torch.empty(0))
    programs = [
        lockstep([sharded.method.directions(shard, state, sharded.options, target)])
        for shard, state, target in zip(sharded.shards, sharded.states, targets, strict=True)
    ]
    return [found for (found,) in SimulatedWorld(len(targets)).run(programs)]
