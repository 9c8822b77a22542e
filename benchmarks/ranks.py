"""Engines with different optimizers in the same gloo ranks, so that their steps can be timed in turns."""

from __future__ import annotations

import copy
import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.spawn import spawn

if TYPE_CHECKING:
    from transformers import LlamaConfig


def on_ranks(ranks: int, measure: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on several gloo ranks, one thread each, and return what it returns on rank 0.

    Args:
        ranks: The number of ranks.
        measure: A module-level function whose result can be written as JSON.
        arguments: Its arguments.
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "found.json")
        spawn(_rank, (free_port(), ranks, measure, arguments, file), nprocs=ranks)  # type: ignore[no-untyped-call]
        return json.loads(file.read_text())


def _rank(
    rank: int, port: int, ranks: int, measure: Callable[..., Any], arguments: tuple[Any, ...], found: Path
) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from ds_lowrank.training import distributed

    distributed.join()
    logging.disable(logging.WARNING)
    result = measure(*arguments)
    if rank == 0:
        found.write_text(json.dumps(result))
    distributed.leave()


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def engines(
    optimizers: Mapping[str, Mapping[str, Any]], model: LlamaConfig, stage: int, micro: int, ranks: int, seed: int
) -> dict[str, Any]:
    """Build one DeepSpeed engine per optimizer, each with its own copy of the same model. Collective.

    Args:
        optimizers: DeepSpeed's ``optimizer`` entries by engine name.
        model: The model's configuration.
        stage: The ZeRO stage.
        micro: Sequences per rank.
        ranks: The number of ranks.
        seed: Seed of the weights.
    """
    import ds_lowrank
    from ds_lowrank.models import llama

    built = {}
    for name, optimizer in optimizers.items():
        config = {
            "train_micro_batch_size_per_gpu": micro,
            "train_batch_size": micro * ranks,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
            "optimizer": copy.deepcopy(dict(optimizer)),
        }
        network = llama.build(model, seed, copy.deepcopy(config))
        engine, *_ = ds_lowrank.initialize(model=network, model_parameters=network.parameters(), config=config)
        engine.train()
        built[name] = engine
    return built
