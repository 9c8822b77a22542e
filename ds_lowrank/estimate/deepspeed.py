"""What DeepSpeed 0.19.8 keeps and sends by its own rules, whatever the optimizer.

With w bytes of a weight, N elements on a rank and P elements of them that it steps, padding included (``P`` is ``N`` at
ZeRO 0, else about ``N / W`` for W data-parallel ranks):

=====  ========  =======================  ===============  =========================
ZeRO   weights   fp32 masters             gradients        gradients in the step
=====  ========  =======================  ===============  =========================
0      w N       4 N, none if w is fp32   w N              (w + 4) N, in fp32 w N
1      w N       4 P                      w N              4 P
2      w N       4 P                      w P              4 P
3      w P       4 P                      w P              (w + 4) P
=====  ========  =======================  ===============  =========================

``tests/engines/test_memory.py`` counts it on engines. DeepSpeed's ``estimate_zero2_model_states_mem_needs`` adds up the
same terms for Adam in 16 bits, ``2 N + 18 P`` with gradients in both precisions, and its like at stage 3 ``18 P``, with
gradients in 32 bits alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_lowrank.estimate.setup import Setup
from ds_lowrank.placement.simulated import flat_share

REDUCE_BUCKET = 500_000_000
"""Elements of DeepSpeed's buffers of gradients, unless ``reduce_bucket_size`` says otherwise; at ZeRO 0 always."""
LIVE_PARAMETERS = 1_000_000_000
"""Elements that ZeRO 3 keeps gathered, unless ``stage3_max_live_parameters`` says otherwise."""
PERSISTENT = 100_000
"""Parameters of up to so many elements stay whole at ZeRO 3, unless ``stage3_param_persistence_threshold`` says so."""


@dataclass(frozen=True)
class Kept:
    """Bytes that DeepSpeed keeps on one rank.

    Attributes:
        weights: of the model.
        masters: fp32 copies of what the rank steps.
        gradients: after a backward pass.
        in_the_step: gradients while the optimizer steps.
        converting: gradients in both forms, between the two.
        backward: buffers of the backward pass: buckets of gradients, and at ZeRO 3 gathered weights.
        reducing: buffers of the reduction after the last backward pass, at ZeRO 0.
        always: buffers that stay.
    """

    weights: int
    masters: int
    gradients: int
    in_the_step: int
    converting: int
    backward: int = 0
    reducing: int = 0
    always: int = 0


def per_element(zero: int, weight: int, whole: float, stepped: float) -> dict[str, float]:
    """Bytes of weights, masters and gradients on a rank.

    Args:
        zero: the stage.
        weight: bytes of a weight in the model's precision.
        whole: elements of the parameters.
        stepped: elements that the rank steps.
    """
    copies = 0 if zero == 0 and weight == 4 else 4
    return {
        "weights": weight * (stepped if zero == 3 else whole),
        "masters": copies * stepped,
        "gradients": weight * (stepped if zero >= 2 else whole),
        "in the step": (copies + (weight if zero in {0, 3} else 0)) * stepped,
    }


def stepped_elements(setup: Setup, numels: Sequence[int]) -> int:
    """Elements that a rank steps of some parameters, padding included: its share of the buffer, or of each.

    Args:
        setup: the run.
        numels: of the parameters of its pipeline stage.
    """
    data = setup.grid.data
    match setup.layout_stage:
        case 0:
            return sum(numels)
        case 3:
            return sum(-(-numel // data) for numel in numels)
    return flat_share(numels, data)


def kept(setup: Setup, numels: Sequence[int]) -> Kept:
    """What DeepSpeed keeps on a rank.

    Args:
        setup: the run.
        numels: of the parameters of its pipeline stage.
    """
    whole, stepped = sum(numels), stepped_elements(setup, numels)
    each = {key: int(value) for key, value in per_element(setup.zero, setup.weight, whole, stepped).items()}
    masters = 4 * stepped if setup.has_masters else 0
    if setup.uses_bf16_optimizer:  # one buffer of gradients for all parameters, of which each rank steps its part
        gradients = in_the_step = setup.accumulator * stepped * setup.grid.data
        return Kept(each["weights"], masters, gradients, in_the_step, gradients, backward=setup.weight * max(numels))
    if setup.accumulator != setup.weight:  # data_types.grad_accum_dtype
        each["gradients"] = each["gradients"] // setup.weight * setup.accumulator
    in_the_step = each["in the step"]
    if not setup.has_masters:  # stepped as they are
        in_the_step = setup.weight * stepped
    converting = 0
    if setup.zero in {1, 2}:  # the share is made flat, then converted, before the parameters' own gradients go
        converting = (2 * setup.accumulator + (4 if setup.accumulator < 4 and setup.has_masters else 0)) * stepped
    return Kept(
        weights=each["weights"] + _persistent(setup, numels),
        masters=masters,
        gradients=each["gradients"],
        in_the_step=in_the_step,
        converting=converting,
        **_buffers(setup, numels),
    )


def _persistent(setup: Setup, numels: Sequence[int]) -> int:
    """Bytes of the small parameters that ZeRO 3 leaves whole, beside their partitions."""
    if setup.zero != 3:
        return 0
    limit = _number(setup, "stage3_param_persistence_threshold", PERSISTENT)
    return setup.weight * sum(numel for numel in numels if numel <= limit)


def _buffers(setup: Setup, numels: Sequence[int]) -> dict[str, int]:
    """Bytes of DeepSpeed's buffers, whose sizes do not depend on the model unless it is smaller.

    ZeRO 1 and 2 make one bucket for a backward pass, two with ``overlap_comm``, of the size that is set, however small
    the model is. ZeRO 3 makes one for good, and gathers weights up to a number of elements before it lets others go. At
    ZeRO 0 gradients are flattened bucket by bucket before they are summed, after the pass.
    """
    whole, settings = sum(numels), setup.zero_settings
    bucket = _number(setup, "reduce_bucket_size", REDUCE_BUCKET) if settings.get("contiguous_gradients", True) else 0
    match setup.zero:
        case 0:
            return {"reducing": setup.weight * min(whole, REDUCE_BUCKET) if setup.grid.data > 1 else 0}
        case 3:
            live = min(whole, _number(setup, "stage3_max_live_parameters", LIVE_PARAMETERS))
            return {"backward": setup.weight * max(live, *numels), "always": setup.accumulator * bucket}
    overlaps = settings.get("overlap_comm") is True and setup.grid.pipeline == 1
    return {"backward": setup.accumulator * bucket * (1 + overlaps)}


def _number(setup: Setup, key: str, default: int) -> int:
    """A size among the settings of ZeRO; the short name of a key of stage 3 is accepted, as DeepSpeed accepts it."""
    value = setup.zero_settings.get(key, setup.zero_settings.get(key.removeprefix("stage3_"), default))
    return default if value == "auto" else int(value)


def bytes_sent(setup: Setup, numels: Sequence[int]) -> int:
    """Bytes that a data-parallel rank sends in an optimizer step for gradients and weights, by rings.

    A ring all-reduce of b bytes sends ``2 (W - 1) / W b``, a reduce-scatter or an all-gather half of that. ZeRO 0 and 1
    sum the gradients of a step once, ZeRO 2 and 3 those of every micro-batch. ZeRO 1 and 2 gather the new weights; ZeRO
    3 gathers weights in every forward and in every backward pass, unless they are still there.

    Args:
        setup: the run.
        numels: of the parameters of its pipeline stage whose whole gradients are summed.
    """
    data, micro_batches, elements = setup.grid.data, setup.batch.accumulation, sum(numels)
    half = (data - 1) / data * elements
    weights, gradients = half * setup.weight, half * setup.weight
    if setup.uses_bf16_optimizer:
        return round(2 * half * setup.accumulator + weights)
    scattered = 1 if setup.zero_settings.get("reduce_scatter", True) else 2
    match setup.zero:
        case 0:
            return round(2 * gradients)
        case 1:
            return round(scattered * gradients + weights)
        case 2:
            return round(scattered * gradients * micro_batches + weights)
    return round((gradients + 2 * weights) * micro_batches)
