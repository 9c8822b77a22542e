"""A checkpoint moved between two grids of simulated ranks in one process: the states of all, written and read.

States are filled by their owners with numbers that only depend on the names, so that what every rank must have after
a move is known without the code that moves it.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ds_lowrank.checkpoint.dealt import chosen, listed
from ds_lowrank.checkpoint.reader import SavedTensors
from ds_lowrank.checkpoint.tensor_file import write_pieces
from ds_lowrank.linalg.quantization import FP32
from ds_lowrank.methods import METHODS
from ds_lowrank.methods.blocks.state_spec import rounding_offsets
from ds_lowrank.optimizer.build_slots import slots_of
from ds_lowrank.optimizer.param_groups import ParameterGroups
from ds_lowrank.optimizer.rows import state_pieces
from ds_lowrank.optimizer.saved_state import load_everything, merged, plain_state
from ds_lowrank.placement.tensor_parallel import logical_matrices
from ds_lowrank.placement.zero import Interval
from ds_lowrank.sharding.pieces import Piece, as_matrix
from tests.methods import of
from tests.simulated.move_worlds import WEIGHTS, World, held_elements, parameter_on

STATE_DTYPES = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class Move:
    """A checkpoint's way from one world to another.

    Attributes:
        source: where it is saved.
        target: where it is loaded.
        method: what steps the matrices.
        params: its options on both.
        saved_as: ``state_dtype`` of the source.
        loaded_as: ``state_dtype`` of the target.
        basis_loaded_as: ``basis_dtype`` of the target; None for that of the source.
    """

    source: World
    target: World
    method: str
    params: dict[str, Any]
    saved_as: str
    loaded_as: str
    basis_loaded_as: str | None = None


def drawn_world(draw, cuts):
    """A world of one to sixteen ranks."""
    tensor, pipeline = draw.choice((1, 1, 2, 4)), draw.choice((1, 1, 2))
    data = draw.randint(1, max(1, 16 // (tensor * pipeline) if tensor * pipeline < 4 else 3))
    return World(data, tensor, pipeline, draw.choice(cuts), draw.choice(("megatron", "autotp")), draw.randrange(10**6))


def drawn_move(draw, method):
    """A move with a method, every state's dtype, and projected reduction where the method can have it."""
    row = of(method)
    params = draw.choice([*row.cases, *row.grid_options])
    cuts = ["zero", "zero", "whole"]
    if METHODS[method].needs_gradient(METHODS[method].Options(**params, reduction="projected")) is None:
        cuts.append("projected")
    saved_as = draw.choice(STATE_DTYPES)
    loaded_as = draw.choice((saved_as, *STATE_DTYPES))
    return Move(drawn_world(draw, cuts), drawn_world(draw, cuts), method, params, saved_as, loaded_as)


class Rank:
    """One rank of a world: its slots with their states, and its weights.

    Args:
        world: of the rank.
        place: its stage, data rank and tensor rank.
        method: what steps the matrices.
        params: its options.
    """

    def __init__(self, world, place, method, params):
        stage, data, tensor = place
        self.model = (stage, tensor)
        grid = SimpleNamespace(tensor_size=world.tensor, tensor_rank=tensor)
        own = [w for w in WEIGHTS if w.stage in (None, stage) or world.pipeline == 1]
        parameters = [parameter_on(weight, world, tensor) for weight in own]
        params = {**params, "exclude_modules": [*params.get("exclude_modules", ()), "*left_out*"]}
        if world.cut == "projected":
            params["reduction"] = "projected"
        self.method = METHODS[method]
        groups = ParameterGroups(self.method, params, lambda _: grid)
        group, options, present = groups.validated({"params": parameters})
        groups.add(group, options, present)
        assert groups.reduces_projections == (world.cut == "projected")
        states = {parameter: {} for parameter in parameters}
        held = {
            (d, t): [held_elements(weight, world, d, t) for weight in own]
            for d in range(world.data)
            for t in range(world.tensor)
        }
        sharing = [(data, t) for t in range(world.tensor)] if world.cut == "whole" else list(held)
        intervals = [Interval(torch.zeros(high - low), low, high, 0) for low, high in held[data, tensor]]
        self.slots = slots_of(
            self.method,
            groups.logical_parameters(states),
            intervals,
            sharing.index((data, tensor)),
            [t for _, t in sharing],
            [held[key] for key in sharing],
        )
        self.groups = groups.param_groups
        self.weights = [
            (logical, interval)
            for weight, parameter, interval in zip(own, parameters, intervals, strict=True)
            for logical in logical_matrices(parameter, tuple(parameter.shape), weight.name, grid)
        ]

    def fill(self, steps):
        """Give every state its numbers."""
        for slot in self.slots:
            slot.state.update(_plain(slot, steps))
            for key, spec in self.specs_of(slot).items():
                stored = own_rows(spec, encoded(slot, key, spec, logical_numbers(slot, key, spec)))
                slot.state.update({key + suffix: tensor for suffix, tensor in stored.items()})

    @staticmethod
    def specs_of(slot):
        return slot.state_store.tensor_specs(slot.state_store.rank_of(slot.state))

    def pieces(self):
        """Of weights and of states."""
        for logical, interval in self.weights:
            rectangles = logical.part(logical.own, interval.start, interval.end).rectangles
            if rectangles:
                whole = numbers(logical.name, logical.shape).view(as_matrix(logical.shape))
                data = torch.cat([_of(whole, r).reshape(-1) for r in rectangles])
                yield Piece(logical.name, logical.shape, rectangles, data)
        yield from state_pieces(self.slots)

    def plain(self):
        return plain_state(self.method.name, self.slots, self.groups, {"refreshes": 3})

    def check(self, steps, saved):
        """Compare every state with what the numbers of the source become in one process.

        Args:
            steps: as in :meth:`fill`.
            saved: a slot of a rank that has saved some of each matrix, by name.
        """
        for slot in self.slots:
            assert slot.plain_values == _plain(slot, steps), slot.tag.name
            there = saved[slot.tag.name]
            saved_specs = self.specs_of(there)
            for key, spec in self.specs_of(slot).items() if slot.geometry.part.numel else ():
                found = logical_numbers(slot, key, spec)
                if _keeps_codes(there, saved_specs[key]) and _keeps_codes(slot, spec):
                    stored = encoded(there, key, saved_specs[key], found)
                else:
                    stored = encoded(slot, key, spec, rounded_numbers(there, key, saved_specs[key], found))
                for suffix, tensor in own_rows(spec, stored).items():
                    own = slot.state[key + suffix]
                    assert own.dtype == tensor.dtype, (slot.tag.name, key + suffix)
                    assert torch.equal(own, tensor), (slot.tag.name, key + suffix)

    def check_weights(self, source):
        for logical, interval in self.weights:
            rectangles = logical.part(logical.own, interval.start, interval.end).rectangles
            out = torch.empty(interval.fragment(logical).weights.shape)
            source.read(logical.name, rectangles, out)
            whole = numbers(logical.name, logical.shape).view(as_matrix(logical.shape))
            assert torch.equal(out, torch.cat([out[:0], *(_of(whole, r).reshape(-1) for r in rectangles)]))


def tried(move: Move, folder: Path) -> dict[str, int]:
    """Save on one world, load on the other, and compare every row of every state and weight.

    Returns:
        The bytes of the files, and of what they hold.
    """
    source, target, method = move.source, move.target, move.method
    source_params = {**move.params, "state_dtype": move.saved_as}
    target_params = {**move.params, "state_dtype": move.loaded_as}
    if move.basis_loaded_as is not None:
        target_params["basis_dtype"] = move.basis_loaded_as
    steps = random.Random(f"{source} {target}").randint(1, 10**4)
    before = [Rank(source, place, method, source_params) for place in source.ranks()]
    for rank in before:
        rank.fill(steps)
    sizes = save(before, folder)
    known = {slot.tag.name: slot for rank in before for slot in rank.slots if slot.geometry.part.numel}
    for rank in load(target, method, target_params, [rank.plain() for rank in before], folder):
        rank.check(steps, known)
    return sizes


def save(ranks, folder: Path) -> dict[str, int]:
    """Write the files of all ranks.

    Returns:
        The bytes of the files, of their headers, and of what they hold.
    """
    pieces = [list(rank.pieces()) for rank in ranks]
    everyone = [(rank.model, listed(own)) for rank, own in zip(ranks, pieces, strict=True)]
    sizes = {"files": 0, "headers": 0}
    for number, own in enumerate(pieces):
        path = folder / f"rank_{number:05d}.safetensors"
        sizes["files"] += write_pieces(path, chosen(own, everyone, number), {}).bytes
        sizes["headers"] += 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with saved_in(folder) as files:
        return {**sizes, "held": sum(files.nbytes(key) for key in files)}


def load(world, method, params, plain, folder: Path) -> list[Rank]:
    """The ranks of another world with what was saved."""
    ranks = [Rank(world, place, method, params) for place in world.ranks()]
    with saved_in(folder) as files:
        for rank in ranks:
            load_everything(rank.method.name, rank.slots, rank.groups, files, merged(plain), (), [], "all")
            rank.check_weights(files)
    return ranks


def saved_in(folder: Path) -> SavedTensors:
    return SavedTensors(folder, sorted(path.name for path in folder.iterdir()))


def numbers(name, shape) -> torch.Tensor:
    """Standard normal numbers, some of them zero, that depend on a name."""
    draw = torch.Generator(device="cpu").manual_seed(zlib.crc32(name.encode()))
    found = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
    return found * (torch.rand(shape, generator=draw, dtype=torch.float32, device="cpu") > 0.05)


def logical_numbers(slot, key, spec) -> torch.Tensor:
    """The whole tensor of a state, rows x columns in the order of the logical matrix."""
    found = numbers(f"{slot.tag.name}/{key}", (spec.axis.size, spec.columns))
    coded = slot.state_store.tensor_specs(slot.state_store.rank_of(slot.state), {"state_dtype": "int8"})[key]
    is_signed = coded.is_basis or coded.quantizer is FP32 or coded.quantizer.signed
    return found if is_signed else found.abs()


def encoded(slot, key, spec, found) -> dict[str, torch.Tensor]:
    """A whole tensor as it is stored, its rows in this grid's order."""
    out = {
        suffix: torch.zeros(1, *shape, dtype=dtype)
        for suffix, (shape, dtype) in spec.quantizer.tensors(spec.axis.size, spec.columns).items()
    }
    offset = rounding_offsets([slot.tag.name], key, slot.state["step"], torch.device("cpu"))
    spec.quantizer.encode(found[order_of(slot, spec)][None], 0, offset, out)
    return {suffix: tensor[0] for suffix, tensor in out.items()}


def own_rows(spec, stored) -> dict[str, torch.Tensor]:
    """A rank's rows of a whole tensor as it is stored."""
    found = {}
    for suffix, tensor in stored.items():
        spans = [spec.quantizer.stored_rows(suffix, span) for span in spec.axis.owned]
        found[suffix] = torch.cat([tensor[:0], *(tensor[low:high] for low, high in spans)])
    return found


def rounded_numbers(slot, key, spec, found) -> torch.Tensor:
    """The numbers that a grid saves, in the order of the logical matrix: as they were rounded there."""
    stored = {suffix: tensor[None] for suffix, tensor in encoded(slot, key, spec, found).items()}
    back = torch.empty_like(found)
    back[order_of(slot, spec)] = spec.quantizer.decode(stored)[0]
    return back


def order_of(slot, spec) -> torch.Tensor:
    """Which row of the logical tensor each row is, as this grid counts them.

    Rows of a dimension are counted alike everywhere. Single elements are too, if every rank has an interval of the
    row-major matrix, or else as the ranks store them, one after the other.
    """
    if spec.axis.layout is not slot.geometry.elements:
        return torch.arange(spec.axis.size)
    ids = torch.arange(spec.axis.size).view(as_matrix(slot.whole.shape))
    if slot.is_projected:
        geometry = slot.geometry
        parts = [geometry.parts[holder] for holder in geometry.holders]
        if all(part.flat_interval(ids.shape[1]) is not None for part in parts):
            return ids.reshape(-1)
        return torch.cat([_of(ids, r).reshape(-1) for part in parts for r in part.rectangles])
    blocks = [[strip.block for strip in own] for own in slot.whole.strips]
    if all(block.cols == (0, ids.shape[1]) for own in blocks for block in own):
        return ids.reshape(-1)
    return torch.cat([ids[slice(*b.rows), slice(*b.cols)].reshape(-1) for own in blocks for b in own])


def _keeps_codes(slot, spec) -> bool:
    """Whether codes mean the same on every grid: their blocks are of the same elements."""
    in_order = torch.equal(order_of(slot, spec), torch.arange(spec.axis.size))
    return spec.quantizer.block_rows > 1 and in_order


def _plain(slot, steps) -> dict[str, Any]:
    """The plain values of a state: how many steps it took, and a rank of its own where ranks change."""
    found = {**slot.plain_values, "step": steps}
    if "rank" in found:
        store = slot.state_store
        found["rank"] = 1 + zlib.crc32(slot.tag.name.encode()) % store.rank
    return found


def _of(matrix, r) -> torch.Tensor:
    return matrix[r.row : r.row + r.height, r.col : r.col + r.width]
