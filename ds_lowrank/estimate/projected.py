"""``reduction`` ``projected`` at ZeRO 0: what is different where gradients are projected before they are summed.

Every rank projects its own gradient of a matrix as soon as backward has made it, adds the result to a sum (fp32, kept
dimension x rank) and frees the gradient. So whole gradients exist of what AdamW steps, of one layer's matrices while
these are projected, and of the matrices that find a new basis in the next step. Bases are kept gathered (fp32,
compressed dimension x rank), and states are dealt over the data-parallel ranks. DeepSpeed sums what AdamW steps; of a
matrix the projection is reduce-scattered and the direction all-gathered: ``2 (W - 1) / W`` x kept x rank x 4 bytes for
W data-parallel ranks, which is counted with the rest of what the optimizer sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_lowrank.estimate.deepspeed import Kept
from ds_lowrank.optimizer.slots import Slot


@dataclass(frozen=True)
class Projections:
    """What a stage's projected matrices need on a rank where gradients are projected.

    Attributes:
        rest: elements of what AdamW steps.
        largest_layer: elements of the projected matrices of the largest layer.
        renewed: elements of the matrices that find a new basis at once, in the fullest step.
        sums: bytes of the projections that are added up over micro-batches.
    """

    rest: int
    largest_layer: int
    renewed: int
    sums: int


def projections(slots: Sequence[Slot], renewed: int) -> Projections:
    """Add up what the matrices of a stage need.

    Args:
        slots: of one rank.
        renewed: elements of the matrices that find a new basis at once, in the fullest step.
    """
    of_layers: dict[str, int] = {}
    sums = 0
    for slot in (slot for slot in slots if slot.is_projected):
        layer = next((part for part in slot.tag.name.split(".") if part.isdecimal()), "")
        of_layers[layer] = of_layers.get(layer, 0) + slot.parameter.numel()
        held = slot.geometry.kept.held.get(slot.geometry.rank, ())
        sums += 4 * slot.rank * sum(hi - lo for lo, hi in held)
    rest = sum(slot.parameter.numel() for slot in slots if not slot.is_projected)
    return Projections(rest, max(of_layers.values(), default=0), renewed, sums)


def without_whole_gradients(kept: Kept, found: Projections, weight: int) -> Kept:
    """What DeepSpeed keeps, where whole gradients of matrices are freed as soon as they are projected.

    Args:
        kept: with whole gradients.
        found: of the stage.
        weight: bytes of a gradient's element.
    """
    whole = weight * (found.rest + max(found.largest_layer, found.renewed)) + found.sums
    in_the_step = weight * (found.rest + found.renewed) + found.sums
    reducing = min(kept.reducing, weight * found.rest)
    return replace(kept, gradients=whole, in_the_step=in_the_step, reducing=reducing)
