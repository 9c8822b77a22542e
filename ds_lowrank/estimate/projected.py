"""``reduction`` ``projected`` at ZeRO 0: what is different where gradients are projected before they are summed.

Every rank projects its own gradient of a matrix as soon as backward has made it, adds the result to an accumulator
(fp32, kept dimension x rank) and frees the gradient. So whole gradients exist of what AdamW steps, of one layer's
matrices, and of the matrices that find a new basis in this step. Bases are kept gathered (fp32, compressed dimension x
rank), and states are dealt over the data-parallel ranks. DeepSpeed sums what AdamW steps; of a matrix the projection is
reduce-scattered and the direction all-gathered, ``2 (W - 1) / W`` x kept x rank x 4 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_lowrank.estimate.deepspeed import Kept
from ds_lowrank.optimizer.slots import Slot


@dataclass(frozen=True)
class Projections:
    """What a stage's projected matrices need on a data-parallel rank where gradients are projected.

    Attributes:
        rest: elements of what AdamW steps.
        largest_layer: elements of the projected matrices of the largest layer.
        renewed: elements of the matrices that find a new basis at once, in the fullest step.
        accumulators: bytes of the projections that are added up.
        bases: bytes of the gathered bases.
        sent: bytes that a rank sends of projections and directions in a step.
    """

    rest: int
    largest_layer: int
    renewed: int
    accumulators: int
    bases: int
    sent: int


def projections(slots: Sequence[Slot], data: int, tensor: int, staggers: bool) -> Projections:
    """Add up what the matrices of a stage need.

    Args:
        slots: of one rank.
        data: the number of data-parallel ranks.
        tensor: the degree of tensor parallelism.
        staggers: whether refreshes are spread over the steps (``stagger``).
    """
    of_layers: dict[str, int] = {}
    accumulators = bases = renewed = 0
    for slot in (slot for slot in slots if slot.is_projected):
        here = slot.parameter.numel()
        layer = next((part for part in slot.tag.name.split(".") if part.isdecimal()), "")
        of_layers[layer] = of_layers.get(layer, 0) + here
        renewed = max(renewed, here) if staggers else renewed + here
        kept, compressed = slot.geometry.kept.size, slot.geometry.compressed.size
        accumulators += 4 * kept * slot.rank // tensor
        bases += 4 * compressed * slot.rank // tensor
    rest = sum(slot.parameter.numel() for slot in slots if not slot.is_projected)
    largest = max(of_layers.values(), default=0)
    sent = round(2 * (data - 1) / data * accumulators)
    return Projections(rest, largest, renewed, accumulators, bases, sent)


def without_whole_gradients(kept: Kept, found: Projections, weight: int) -> Kept:
    """What DeepSpeed keeps, where whole gradients of matrices are freed as soon as they are projected.

    Args:
        kept: with whole gradients.
        found: of the stage.
        weight: bytes of a gradient's element.
    """
    whole = weight * (found.rest + max(found.largest_layer, found.renewed)) + found.accumulators
    in_the_step = whole if kept.masters == 0 else whole + 4 * found.rest
    reducing = min(kept.reducing, weight * found.rest)
    return replace(kept, gradients=whole, in_the_step=in_the_step, reducing=reducing)
