"""Which rank writes which piece: every element once, and each rank about as many bytes as the others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ds_lowrank.checkpoint.tensor_file import places
from ds_lowrank.collectives import all_gather_object, global_rank, is_distributed
from ds_lowrank.sharding.pieces import Piece


def own_share(pieces: Sequence[Piece], stage: int) -> list[Piece]:
    """The pieces that this rank writes. Collective.

    Replicas of a piece are dealt over the ranks that have them. What two stages of a pipeline have, a tied embedding,
    may be cut in different ways there: the first of these stages writes it.

    Args:
        pieces: what this rank has.
        stage: this rank's stage of the pipeline.
    """
    if not is_distributed():
        return list(pieces)
    own = [(piece.key, _digest(piece), piece.data.numel() * piece.data.element_size()) for piece in pieces]
    everyone = all_gather_object((stage, own))
    first_stage: dict[str, int] = {}
    for at, listed in everyone:
        for key, _, _ in listed:
            first_stage[key] = min(at, first_stage.get(key, at))
    having: dict[tuple[str, bytes], list[int]] = {}
    sizes: dict[tuple[str, bytes], int] = {}
    for rank, (at, listed) in enumerate(everyone):
        for key, digest, size in listed:
            if first_stage[key] == at:
                having.setdefault((key, digest), []).append(rank)
                sizes[key, digest] = size
    loads = [0] * len(everyone)
    writer: dict[tuple[str, bytes], int] = {}
    for name, ranks in having.items():
        chosen = min(ranks, key=loads.__getitem__)
        writer[name] = chosen
        loads[chosen] += sizes[name]
    rank = global_rank()
    return [piece for piece, (key, digest, _) in zip(pieces, own, strict=True) if writer.get((key, digest)) == rank]


def _digest(piece: Piece) -> bytes:
    """The same for the same elements of the same tensor."""
    return hashlib.blake2b(repr(places(piece)).encode(), digest_size=8).digest()
