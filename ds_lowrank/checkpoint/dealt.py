"""Which rank writes which piece: every element once, and each rank about as many bytes as the others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ds_lowrank.checkpoint.tensor_file import places
from ds_lowrank.collectives import all_gather_object, global_rank, is_distributed
from ds_lowrank.sharding.pieces import Piece

Model = tuple[int, int]
"""Where a rank is in the model: its stage of the pipeline, and its tensor-parallel rank."""


@dataclass(frozen=True)
class Listed:
    """What the other ranks need to know about a piece.

    Attributes:
        key: the tensor's name.
        digest: the same for the same elements of the same tensor.
        elements: how many they are.
        of: how many the tensor has.
        size: their bytes.
    """

    key: str
    digest: bytes
    elements: int
    of: int
    size: int


def own_share(pieces: Sequence[Piece], model: Model) -> list[Piece]:
    """The pieces that this rank writes. Collective.

    Args:
        pieces: what this rank has.
        model: where it is in the model.
    """
    if not is_distributed():
        return list(pieces)
    everyone = all_gather_object((model, listed(pieces)))
    return chosen(pieces, everyone, global_rank())


def listed(pieces: Sequence[Piece]) -> list[Listed]:
    """What a rank tells the others.

    Args:
        pieces: what it has.
    """
    found = []
    for piece in pieces:
        digest = hashlib.blake2b(repr(places(piece)).encode(), digest_size=8).digest()
        elements = piece.data.numel()
        found.append(Listed(piece.key, digest, elements, math.prod(piece.shape), elements * piece.data.element_size()))
    return found


def chosen(pieces: Sequence[Piece], everyone: Sequence[tuple[Model, Sequence[Listed]]], rank: int) -> list[Piece]:
    """The pieces that a rank writes: replicas are dealt over the ranks that have them.

    Args:
        pieces: what it has.
        everyone: of every rank, where it is and what it has.
        rank: which of them it is.
    """
    having: dict[tuple[str, bytes], list[int]] = {}
    sizes: dict[tuple[str, bytes], int] = {}
    copies = _copies(everyone)
    for other, (model, own) in enumerate(everyone):
        for one in own:
            if _is_of(model, copies[one.key]):
                having.setdefault((one.key, one.digest), []).append(other)
                sizes[one.key, one.digest] = one.size
    loads = [0] * len(everyone)
    writer: dict[tuple[str, bytes], int] = {}
    for name, ranks in having.items():
        least = min(ranks, key=loads.__getitem__)
        writer[name] = least
        loads[least] += sizes[name]
    own = everyone[rank][1]
    return [piece for piece, one in zip(pieces, own, strict=True) if writer.get((one.key, one.digest)) == rank]


def _copies(everyone: Sequence[tuple[Model, Sequence[Listed]]]) -> dict[str, tuple[int, int | None]]:
    """Which copy of each tensor is written: the stage, and the tensor-parallel rank or None for all of them.

    What two stages of a pipeline have, a tied embedding, may be cut in different ways there. So may what every
    tensor-parallel rank has a copy of: where ZeRO cuts it depends on the shards beside it, and these may differ in
    size. The first of them write it.
    """
    places_of: dict[str, dict[Model, dict[bytes, Listed]]] = {}
    for model, own in everyone:
        for one in own:
            places_of.setdefault(one.key, {}).setdefault(model, {})[one.digest] = one
    found: dict[str, tuple[int, int | None]] = {}
    for key, by_model in places_of.items():
        stage, tensor = min(by_model)
        different = {d: one for (at, _), own in by_model.items() if at == stage for d, one in own.items()}
        present, total = sum(one.elements for one in different.values()), next(iter(different.values())).of
        found[key] = stage, None if present <= total else tensor
    return found


def _is_of(model: Model, copy: tuple[int, int | None]) -> bool:
    return model[0] == copy[0] and copy[1] in (None, model[1])
