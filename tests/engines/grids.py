"""A small LLaMA trained by real engines on a grid of data x tensor x pipeline ranks, and its dense oracle.

Also what the tests of grids share: the grids themselves, errors at start as text, and the role table as text.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
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
    """The number of ranks along each axis, and the ZeRO stage.

    Attributes:
        layers: ``megatron`` for megatron-core's parallel layers, ``autotp`` for DeepSpeed's AutoTP on Hugging Face's
            model.
    """

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


PIPELINE = Grid(1, 1, 2, 0)
GRIDS = [
    Grid(1, 2, 1, 0),
    Grid(1, 1, 2, 0),
    Grid(1, 2, 2, 0),
    Grid(1, 2, 2, 1),
    *(Grid(2, 2, 1, stage) for stage in range(4)),
    *(Grid(2, 1, 2, stage) for stage in (0, 1)),
    *(Grid(2, 2, 1, stage, "autotp") for stage in range(4)),
]
CUBE = Grid(2, 2, 2, 1)
CROSSED = [Grid(2, 2, 1, 2), Grid(1, 2, 2, 1), Grid(2, 1, 2, 0), Grid(2, 2, 1, 1, "autotp")]
"""For the methods other than GaLore: each kind of layers, each axis, and each way of placing elements once."""


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**SIZES, **changes})


def dense_model(**changes: Any) -> torch.nn.Module:
    from ds_lowrank.models import llama

    return llama.build(llama_config(**changes), seed=0)


def tokens(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator, device="cpu")


class GridOracle(Oracle):
    """The dense oracle on this module's ``tokens``."""

    batch = staticmethod(tokens)


@functools.cache
def oracle(method: str, clip: float, steps: int, **changes: Any) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Train the dense oracle; ``changes`` are to the model.

    Returns:
        The weights after the first and after the last step, and every step's gradient norm.
    """
    dense = GridOracle(clip, dense_model(**changes), method=method)
    dense.step(0)
    first = dense.weights()
    for step in range(1, steps):
        dense.step(step)
    return [first, dense.weights()], dense.norms


def start(
    grid: Grid,
    settings: dict[str, Any],
    recompute: bool = False,
    sequence_parallel: bool = False,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **changes: Any,
) -> Any:
    """Start an engine of the grid in the context ``around``; ``changes`` are to the model, which is made outside."""
    import ds_lowrank
    from ds_lowrank.integration.mpu import make_grid
    from ds_lowrank.models import llama_parallel

    if grid.layers == "autotp":
        settings = {**settings, "tensor_parallel": {"autotp_size": grid.tensor}}
        del settings["train_batch_size"]  # DeepSpeed takes every rank for a data-parallel one when it checks it
        dense = dense_model(**changes)
        with around():
            return ds_lowrank.initialize(model=dense, config=settings)[0]
    mpu = make_grid(grid.tensor, grid.pipeline)
    model = llama_parallel.build(
        llama_config(**changes),
        *(0, grid.tensor, grid.pipeline),
        recompute=recompute,
        sequence_parallel=sequence_parallel,
    )
    with around():
        return ds_lowrank.initialize(model=model, config=settings, mpu=None if grid.pipeline > 1 else mpu)[0]


def settings_of(grid: Grid, **changes: Any) -> dict[str, Any]:
    return config(grid.stage, grid.data, **changes)


def train_step(engine: Any, step: int) -> float:
    """Take one optimizer step.

    Returns:
        The mean loss of this rank's micro-batches; in a pipeline, of all ranks' micro-batches.
    """
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


def train_and_gather(engine: Any, steps: Iterable[int]) -> dict[str, torch.Tensor]:
    """Train on the batches of these steps, and return the whole weights, which are on rank 0."""
    from ds_lowrank.checkpoint.gather import whole_weights

    for step in steps:
        train_step(engine, step)
    return whole_weights(engine)


def run_grid(grid: Grid, settings: dict[str, Any], steps: int, **changes: Any) -> dict[str, Any]:
    """Start an engine, train, and return weights after the first and the last step and what the optimizer reports."""
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


def message_of(attempt: Callable[[], Any]) -> str:
    """The error that ``attempt`` raises on this rank, its own or another rank's; empty if there is none."""
    from ds_lowrank.collectives import RemoteError

    try:
        attempt()
    except (ValueError, RemoteError) as error:
        return str(error)
    return ""


def start_error(grid: Grid, settings: dict[str, Any], **changes: Any) -> str:
    """The message with which ``start`` refuses."""
    return message_of(lambda: start(grid, settings, **changes))


def initialize_error(model: torch.nn.Module, settings: dict[str, Any], **given: Any) -> str:
    """The message with which ``ds_lowrank.initialize`` refuses."""
    import ds_lowrank

    return message_of(lambda: ds_lowrank.initialize(model=model, config=settings, **given))


def own_initialize_error(model: torch.nn.Module, settings: dict[str, Any], **given: Any) -> str:
    """The same where every rank must find the error by itself: an error reported by another rank is raised."""
    import ds_lowrank

    try:
        ds_lowrank.initialize(model=model, config=settings, **given)
    except ds_lowrank.ConfigError as error:
        return str(error)
    return ""


def plain_pipeline() -> Any:
    """Two linear layers, 6 to 8 on the first stage and 8 to 6 on the second."""
    from deepspeed.pipe import LayerSpec, PipelineModule
    from torch import nn

    layers = [LayerSpec(nn.Linear, 6, 8), LayerSpec(nn.Linear, 8, 6, bias=False)]
    return PipelineModule(layers, num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform")


def role_table_of(grid: Grid, settings: dict[str, Any], **changes: Any) -> str:
    """The role table that this rank logs at start; empty on ranks that log none."""
    log, text = logging.getLogger("ds_lowrank"), io.StringIO()
    logging.disable(logging.NOTSET)
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler(text))
    start(grid, settings, **changes)
    return text.getvalue()
