"""A small LLaMA trained by real engines on a grid of data x tensor x pipeline ranks, and the dense oracle beside it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from tests.engines.scenario import BATCH, Oracle, config

VOCAB, LENGTH = 132, 12
SIZES = {
    "hidden_size": 40,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "use_cache": False,
}


@dataclass(frozen=True)
class Grid:
    """``layers``: megatron-core's, or DeepSpeed's AutoTP on Hugging Face's model."""

    data: int
    tensor: int
    pipeline: int
    stage: int
    layers: str = "megatron"

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline

    def __str__(self) -> str:
        return f"dp{self.data}-tp{self.tensor}-pp{self.pipeline}-zero{self.stage}-{self.layers}"


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**SIZES, **changes})


def dense_model(**changes: Any) -> torch.nn.Module:
    from ds_lowrank.models import llama

    return llama.build(llama_config(**changes), seed=0)


def tokens(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)


class GridOracle(Oracle):
    """On this file's tokens, and with the norm of each step's gradient."""

    batch = staticmethod(tokens)


@functools.cache
def oracle(method: str, clip: float, steps: int, **changes: Any) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Weights after the first and the last step, and the gradient norms; ``changes`` to the model."""
    dense = GridOracle(clip, dense_model(**changes), method=method)
    dense.step(0)
    first = dense.weights()
    for step in range(1, steps):
        dense.step(step)
    return [first, dense.weights()], dense.norms


def start(
    grid: Grid, settings: dict[str, Any], recompute: bool = False, sequence_parallel: bool = False, **changes: Any
):
    import ds_lowrank
    from ds_lowrank.integration.mpu import make_grid
    from ds_lowrank.models import llama_parallel

    if grid.layers == "autotp":
        settings = {**settings, "tensor_parallel": {"autotp_size": grid.tensor}}
        del settings["train_batch_size"]  # DeepSpeed takes every rank for a data-parallel one when it checks it
        return ds_lowrank.initialize(model=dense_model(**changes), config=settings)[0]
    mpu = make_grid(grid.tensor, grid.pipeline)
    model = llama_parallel.build(
        llama_config(**changes),
        *(0, grid.tensor, grid.pipeline),
        recompute=recompute,
        sequence_parallel=sequence_parallel,
    )
    return ds_lowrank.initialize(model=model, config=settings, mpu=None if grid.pipeline > 1 else mpu)[0]


def settings_of(grid: Grid, **changes: Any) -> dict[str, Any]:
    return config(grid.stage, grid.data, **changes)


def train_step(engine: Any, step: int) -> float:
    """One optimizer step; the loss of this rank's micro-batches (with a pipeline, of all)."""
    import torch.distributed as dist

    import ds_lowrank

    group = engine.seq_data_parallel_group
    mine = tokens(step).chunk(dist.get_world_size(group))[dist.get_rank(group)]
    micros = mine.chunk(engine.gradient_accumulation_steps())
    if hasattr(engine, "train_batch"):
        return float(ds_lowrank.train_batch(engine, [(micro, micro) for micro in micros]))
    losses = ds_lowrank.forward_backward(
        engine, [lambda m=micro: engine(input_ids=m, labels=m).loss for micro in micros]
    )
    engine.step()
    return float(torch.stack(losses).mean())


def run_grid(grid: Grid, settings: dict[str, Any], steps: int, **changes: Any) -> dict[str, Any]:
    from ds_lowrank.checkpoint.gather import whole_weights
    from ds_lowrank.optimizer.report import state_bytes

    engine = start(grid, settings, **changes)
    weights, norms, losses = [], [], []
    for step in range(steps):
        losses.append(train_step(engine, step))
        norms.append(float(engine.get_global_grad_norm() or 0.0))
        if step in (0, steps - 1):
            weights.append(whole_weights(engine))
    optimizer = engine.basic_optimizer
    return {
        "weights": weights,
        "norms": norms,
        "losses": losses,
        "wrapper": optimizer.wrapper,
        "metrics": optimizer.metrics(),
        "bytes": state_bytes(optimizer.slots),
        "names": [slot.tag.name for slot in optimizer.slots],
    }
