"""One matrix over the ranks of a simulated world, stepped by any method, beside its dense reference."""

import itertools

import torch

from ds_lowrank.methods import METHODS
from ds_lowrank.methods.blocks.state_spec import StateStore
from ds_lowrank.sharding.layout import Block, ContiguousPart
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import lockstep
from ds_lowrank.sharding.world import SimulatedWorld
from tests.reference import DENSE


class Sharded:
    """One matrix over the parts of a simulated world."""

    def __init__(self, method, weight, parts, name="w", peers=None, **options):
        self.method = METHODS[method]
        self.weight, self.parts, self.options = weight, parts, self.method.Options(**options)
        shape, world = tuple(weight.shape), len(parts)
        assert self.method.unsupported_shape(shape, self.options) is None
        root = max(range(world), key=lambda i: parts[i].numel)
        side = self.method.side(shape, self.options)
        run = self.options.block_rows
        self.peers = range(world) if peers is None else peers
        self.shards = [MatrixShard(name, shape, parts, i, side, root, run, peers) for i in range(world)]
        rank = self.method.rank(shape, self.options)
        self.state_stores = [
            StateStore(name, lambda at, s=s: self.method.state(s, self.options, at), rank) for s in self.shards
        ]
        self.states = [{"step": 0, **keep.empty(torch.device("cpu"))} for keep in self.state_stores]
        self.world, self.t = SimulatedWorld(world), 0

    def cut(self, tensor, part):
        (r0, r1), (c0, c1) = part.block.rows, part.block.cols
        return tensor[r0:r1, c0:c1].reshape(-1)[part.start : part.end].clone()

    def attach(self, gradient):
        for shard in self.shards:
            shard.attach(self.cut(gradient, shard.part), self.cut(self.weight, shard.part))

    def begin(self, gradient):
        self.attach(gradient)
        self.opened = [keep.decode(state) for keep, state in zip(self.state_stores, self.states, strict=True)]

    def program(self, rank):
        return self.whole_step(self.shards[rank], self.opened[rank])

    def programs(self, gradient):
        self.begin(gradient)
        return [lockstep([self.program(rank)]) for rank in range(len(self.parts))]

    def whole_step(self, shard, state):
        """Both halves of a step, for a gradient that is known to be finite."""
        found = yield from self.method.project(shard, state, self.options, self.t)
        largest = found.projected.abs().max() if found.projected.numel() else torch.tensor(0.0)
        size = yield shard.all_reduce(largest.view(1, 1))
        found.magnitude = size.item()
        return (yield from self.method.update(shard, state, self.options, self.t, found))

    def step(self, gradient):
        updates = self.world.run(self.programs(gradient))
        self.finish({rank: update for rank, (update,) in enumerate(updates)})

    def finish(self, updates):
        """Write what the peers' programs returned."""
        self.t += 1
        for rank, update in updates.items():
            part, flat = self.parts[rank], self.cut(self.weight, self.parts[rank])
            self.shards[rank].write(
                flat, update, self.options.effective_lr, self.options.effective_lr * self.options.weight_decay
            )
            (r0, r1), (c0, c1) = part.block.rows, part.block.cols
            block = self.weight[r0:r1, c0:c1].reshape(-1)
            block[part.start : part.end] = flat
            self.weight[r0:r1, c0:c1] = block.view(r1 - r0, c1 - c0)
            self.state_stores[rank].encode(self.states[rank], self.opened[rank])
            self.states[rank]["step"] = self.t


def step_together(world, matrices, gradients):
    """One step of several matrices in lockstep. A rank takes part in those of which it is a peer."""
    for matrix, gradient in zip(matrices, gradients, strict=True):
        matrix.begin(gradient)
    sharing = [[matrix for matrix in matrices if rank in matrix.peers] for rank in range(world.size)]
    found = world.run([lockstep([m.program(rank) for m in own]) for rank, own in enumerate(sharing)])
    for matrix in matrices:
        matrix.finish({rank: found[rank][sharing[rank].index(matrix)] for rank in matrix.peers})


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
    sharded = Sharded(method, start, parts, **options)
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
