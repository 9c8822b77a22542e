"""The scenario's LLaMA under DeepSpeed's sequence parallelism (Ulysses): every rank has a part of each sequence.

Attention is DeepSpeed's ``UlyssesSPAttentionHF``, which exchanges heads for positions. A rank's loss is its share of
the mean over all tokens, so that the losses of a sequence group add up to the oracle's. At ZeRO 3 DeepSpeed averages
over a sequence group what it sums at the other stages, so that the loss is that much larger there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tests.engines.scenario import broadcast_dense_init, config, full_weights, make_model_for, tokens
from tests.engines.trace import trace


def settings_of(stage: int, data: int, dtype: str = "fp32", gas: int = 1, **changes: Any) -> dict[str, Any]:
    """The scenario's configuration; ``data`` counts the sequence groups, as the batch size does."""
    return config(stage, data, dtype, gas, **changes)


def start(
    settings: dict[str, Any], size: int, stock: bool = False, megatron: bool = False, zero_init: bool = False
) -> Any:
    """Start an engine whose sequence groups have ``size`` ranks.

    Args:
        settings: the DeepSpeed configuration.
        size: ranks of a sequence group.
        stock: by DeepSpeed's own ``initialize``, after ``register()``.
        megatron: with a unit like that of Megatron-DeepSpeed instead of ``parallel_state_sp``.
        zero_init: build the model under ``zero.Init``.
    """
    import torch.distributed as dist
    from deepspeed import initialize
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    import ds_lowrank

    model = make_model_for(settings, zero_init)
    if zero_init:
        broadcast_dense_init(model, {})
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=size,
        micro_batch_size=settings["train_micro_batch_size_per_gpu"],
    )
    if megatron:
        groups = dist.get_world_size() // size
        mpu = Unit(
            tensor_model_parallel=(1, 1),
            pipeline_model_parallel=(1, 1),
            model_parallel=(1, 1),
            sequence_parallel=(size, 1),
            data_parallel=(groups, size),
            sequence_data_parallel=(groups * size, 1),
        )
    if not stock:
        return ds_lowrank.initialize(model=model, config=settings, mpu=mpu)[0]
    ds_lowrank.register()
    ds_lowrank.tag_parameters(model)
    return initialize(model=model, model_parameters=model.parameters(), config=settings, mpu=mpu)[0]


class Unit:
    """A model-parallel unit with the getters of some groups: ``get_NAME_group``, ``_world_size`` and ``_rank``.

    Args:
        strides: for each name (``tensor_model_parallel``, ``data_parallel``, ...) the size of its groups and the
            distance of their ranks.
    """

    def __init__(self, **strides: tuple[int, int]) -> None:
        import torch.distributed as dist

        for name, (size, stride) in strides.items():
            group = None
            for first in range(dist.get_world_size()):
                if first // stride % size:
                    continue
                ranks = [first + index * stride for index in range(size)]
                made = dist.new_group(ranks)
                group = made if dist.get_rank() in ranks else group
            setattr(self, f"get_{name}_group", lambda group=group: group)
            setattr(self, f"get_{name}_world_size", lambda size=size: size)
            setattr(self, f"get_{name}_rank", lambda group=group: dist.get_rank(group))


def train_step(engine: Any, step: int) -> list[float]:
    """Take one optimizer step; the losses of this rank's micro-batches."""
    import torch.distributed as dist
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as mpu

    import ds_lowrank

    size, rank = mpu.get_sequence_parallel_world_size(), mpu.get_sequence_parallel_rank()
    groups = dist.get_world_size() // size
    mine = tokens(step).chunk(groups)[dist.get_rank() // size]
    micros = mine.chunk(engine.gradient_accumulation_steps())
    losses = ds_lowrank.forward_backward(engine, [lambda m=micro: _loss(engine, m, size, rank) for micro in micros])
    engine.step()
    return [float(loss) for loss in losses]


def _loss(engine: Any, batch: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """This rank's share of the mean loss of a batch: the sum over its tokens, by the number of all predictions."""
    targets = F.pad(batch[:, 1:], (0, 1), value=-100).chunk(size, dim=1)[rank]
    positions = torch.arange(batch.shape[1]).expand_as(batch).chunk(size, dim=1)[rank]
    logits = engine(input_ids=batch.chunk(size, dim=1)[rank].contiguous(), position_ids=positions.contiguous()).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    factor = size if engine.zero_optimization_stage() == 3 else 1
    return factor * loss / (batch.numel() - batch.shape[0])


def run_ulysses(settings: dict[str, Any], size: int, steps: int, **options: Any) -> dict[str, Any]:
    """Train; the weights after the first and after the last step, and the gradient norms."""
    engine = start(settings, size, **options)
    weights, norms = [], []
    for step in range(steps):
        train_step(engine, step)
        norms.append(float(engine.get_global_grad_norm() or 0.0))
        if step in (0, steps - 1):
            weights.append(full_weights(engine))
    return {"weights": weights, "norms": norms, "metrics": engine.basic_optimizer.metrics()}


def trace_ulysses(settings: dict[str, Any], size: int, steps: int, **options: Any) -> dict[str, Any]:
    """What the wrapper presents to the optimizer in each step, and what comes out."""
    return trace(start(settings, size, **options), steps, train_step)
