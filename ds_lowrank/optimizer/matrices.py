"""From what ranks hold to what is stepped: matrices that are cut alike share a geometry and the way state is stored."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ds_lowrank.methods.base import Method, Options
from ds_lowrank.methods.blocks.full_rank_adam import full_rank_state
from ds_lowrank.methods.blocks.state_spec import Formats, StateStore
from ds_lowrank.optimizer.stack import SteppedMatrix
from ds_lowrank.placement.fragment import Fragment
from ds_lowrank.sharding.geometry import Geometry, Side
from ds_lowrank.sharding.layout import Part
from ds_lowrank.sharding.matrix import Member, shard_of


class Matrices:
    """Makes the matrices of one optimizer on one rank.

    Args:
        method: the method that steps them.
        rank: this rank's position in the group.
        first_number: identifies the first matrix among those that are stepped together.
    """

    def __init__(self, method: type[Method], rank: int, first_number: int = 0) -> None:
        self._method, self._rank = method, rank
        self._geometries: dict[Hashable, Geometry] = {}
        self._stores: dict[Hashable, StateStore] = {}
        self._waiting: dict[int, list[SteppedMatrix]] = {}
        self._count = first_number

    def projected(
        self,
        name: str,
        shape: tuple[int, int],
        parts: Sequence[Part],
        options: Options,
        fragment: Fragment,
        group: Hashable = None,
        peers: Sequence[int] | None = None,
        transposed: bool = False,
    ) -> SteppedMatrix:
        """A matrix that the method steps. Its state is made by :meth:`make_states`.

        Args:
            name: of the matrix; seeds derive from it.
            shape: the logical ``(m, n)``.
            parts: what each rank of the group holds.
            options: of the matrix's group.
            fragment: where this rank's elements are.
            group: identifies the matrix's group.
            peers: the ranks that share this copy of the matrix; None for all.
            transposed: whether its layer stores it input x output. It is then stepped as the transpose would be.
        """
        as_output_first = output_first(shape, transposed)
        side = self._method.side(as_output_first, options)
        if transposed:
            side = "left" if side == "right" else "right"
        geometry = self._geometry(shape, parts, side, options.block_rows, peers, transposed)
        key = (id(geometry), group, "projected")
        if key not in self._stores:
            shard, method = shard_of(name, geometry), self._method
            initial = method.rank(as_output_first, options)
            self._stores[key] = StateStore(
                lambda rank, formats: method.state(shard, _stored_as(options, formats), rank), initial
            )
        number, self._count = self._count, self._count + 1
        root = geometry.holders[number % len(geometry.holders)]
        return self._made(Member(name, root, number), geometry, fragment, self._stores[key], options)

    def elementwise(
        self,
        name: str,
        parts: Sequence[Part],
        options: Options,
        fragment: Fragment,
        group: Hashable = None,
        peers: Sequence[int] | None = None,
    ) -> SteppedMatrix:
        """A parameter of any shape as one row. The side does not matter, as nothing is compressed.

        The arguments are those of :meth:`projected`.
        """
        shape = 1, sum(part.numel for part in parts)
        geometry = self._geometry(shape, parts, "right", options.moment_block_rows, peers, False)
        key = (id(geometry), group, "elementwise")
        if key not in self._stores:
            shard = shard_of(name, geometry)
            self._stores[key] = StateStore(lambda _, formats: full_rank_state(shard, _stored_as(options, formats)), 0)
        return self._made(Member(name), geometry, fragment, self._stores[key], options)

    def _geometry(
        self,
        shape: tuple[int, int],
        parts: Sequence[Part],
        side: Side,
        block_rows: int,
        peers: Sequence[int] | None,
        transposed: bool,
    ) -> Geometry:
        found = Geometry(shape, parts, self._rank, side, block_rows, peers, transposed)
        return self._geometries.setdefault(found.key, found)

    def _made(
        self, member: Member, geometry: Geometry, fragment: Fragment, store: StateStore, options: Options
    ) -> SteppedMatrix:
        matrix = SteppedMatrix(member, geometry, fragment, store, {}, options)
        self._waiting.setdefault(id(store), []).append(matrix)
        return matrix

    def make_states(self) -> None:
        """Create the states of all matrices made so far; those of equal matrices lie behind one another in memory."""
        for matrices in self._waiting.values():
            states = matrices[0].state_store.empty(matrices[0].fragment.store.device, len(matrices))
            for matrix, state in zip(matrices, states, strict=True):
                matrix.state |= {"step": 0, **state}
        self._waiting = {}


def output_first(shape: tuple[int, int], transposed: bool) -> tuple[int, int]:
    """The shape of a weight as ``torch.nn.Linear`` would have it, output x input, which methods are asked about.

    Args:
        shape: as the layer stores it.
        transposed: whether the layer stores it input x output.
    """
    return (shape[1], shape[0]) if transposed else shape


def _stored_as(options: Options, formats: Formats) -> Options:
    """The options with other formats, as a checkpoint may have."""
    return options.model_copy(update=dict(formats)) if formats else options
