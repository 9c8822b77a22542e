"""What takes turns on the wire: engines of DeepSpeed, and DDP with and without PowerSGD, each with the same weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from transformers import LlamaConfig

RANKS = (128, 64)
"""GaLore's ranks, beside matrices that are 512 wide."""
POWER_RANKS = (1, 2, 4, 8, 32)
POWER_START = 2
"""PowerSGD's first compressed step; torch allows none earlier with error feedback."""
ONE_BUCKET = 2**12
"""DDP's bucket in MiB, more than the gradients of the model."""
WARM_UP = POWER_START + 2
NEVER = 10**9
"""A refresh interval that ends after the benchmark: only the first step refreshes."""
LENGTH = 128
"""Tokens of a sequence; a micro-batch is one sequence a rank."""
MANY = 4
"""Micro-batches of the contenders that accumulate."""

Batches = Sequence[torch.Tensor]
Step = Callable[[Batches], float]
"""Takes the rank's micro-batches, and returns their mean loss."""


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        name: In the tables.
        micro_batches: How many a step has.
        zero: DeepSpeed's stage; None for DDP.
        optimizer: DeepSpeed's ``optimizer`` entry; for DDP the optimizer is torch's AdamW.
        power_rank: Of PowerSGD's hook; None for plain all-reduces.
    """

    name: str
    micro_batches: int = 1
    zero: int | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    power_rank: int | None = None

    @property
    def refreshes(self) -> bool:
        """Whether the first step also finds bases."""
        return self.optimizer.get("type") == "GaLore"


def contenders(ranks: Sequence[int] = RANKS, power_ranks: Sequence[int] = POWER_RANKS) -> list[Contender]:
    """Return all of them, the peers first.

    Args:
        ranks: GaLore's. The first is also that of the contenders with several micro-batches.
        power_ranks: PowerSGD's.
    """
    adamw = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    main, _ = ranks
    found = [
        Contender("AdamW, ZeRO 1", zero=1, optimizer=adamw),
        Contender(f"GaLore {main}, ZeRO 1", zero=1, optimizer=galore(main)),
        Contender("AdamW, DDP"),
        *(Contender(f"PowerSGD {rank}, DDP", power_rank=rank) for rank in power_ranks),
        *(Contender(f"GaLore {rank}, projected", zero=0, optimizer=projected(galore(rank))) for rank in ranks),
        Contender(f"GaLore {main} reverse_std, projected", zero=0, optimizer=projected(galore(main, "reverse_std"))),
        Contender(f"VLoRP {main}, projected", zero=0, optimizer=projected(vlorp(main))),
    ]
    several = {"AdamW, ZeRO 1": (1, adamw), f"GaLore {main}, ZeRO 1": (1, galore(main))}
    several |= {f"GaLore {main}, projected": (0, projected(galore(main)))}
    several |= {f"VLoRP {main}, projected": (0, projected(vlorp(main)))}
    found += [Contender(f"{name}, x {MANY}", MANY, zero, optimizer) for name, (zero, optimizer) in several.items()]
    return found + [Contender(f"PowerSGD {rank}, DDP, x {MANY}", MANY, power_rank=rank) for rank in power_ranks[2:3]]


def galore(rank: int, side: str = "std") -> dict[str, Any]:
    """Return DeepSpeed's ``optimizer`` entry of GaLore.

    Args:
        rank: The columns of its bases.
        side: Its ``proj_type``. ``reverse_std`` compresses the longer dimension, so that fewer rows travel.
    """
    return {"type": "GaLore", "params": {"lr": 1e-2, "rank": rank, "update_proj_gap": NEVER, "proj_type": side}}


def vlorp(rank: int) -> dict[str, Any]:
    """Return that of VLoRP, with as many numbers a row as GaLore has at a rank: eight units of an eighth."""
    return {"type": "VLoRP", "params": {"lr": 1e-3, "rank": rank // 8, "granularity": 8}}


def projected(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return the entry with gradients that are projected before they are summed over ranks."""
    return {**optimizer, "params": {**optimizer["params"], "reduction": "projected"}}


def build(contender: Contender, model: LlamaConfig, seed: int) -> Step:
    """Build a contender's model and optimizer, and return its step. Collective.

    Args:
        contender: Which one.
        model: The model's configuration.
        seed: Of the weights, which are the same for all.

    Raises:
        ds_lowrank.errors.ConfigError: The package refuses its options.
    """
    if contender.zero is not None:
        return _deepspeed(contender, contender.zero, model, seed)
    return _ddp(contender, model, seed)


def _deepspeed(contender: Contender, zero: int, model: LlamaConfig, seed: int) -> Step:
    import ds_lowrank
    from ds_lowrank.models import llama
    from ds_lowrank.training.loop import train_step

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": contender.micro_batches,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "zero_optimization": {"stage": zero},
        "optimizer": copy.deepcopy(contender.optimizer),
    }
    network = llama.build(model, seed, copy.deepcopy(config))
    engine, *_ = ds_lowrank.initialize(model=network, model_parameters=network.parameters(), config=config)
    engine.train()

    def step(batches: Batches) -> float:
        inputs = [{"input_ids": batch, "labels": batch} for batch in batches]
        return float(train_step(engine, inputs, measure=False).loss)

    return step


def _ddp(contender: Contender, model: LlamaConfig, seed: int) -> Step:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
    from torch.nn.parallel import DistributedDataParallel

    from ds_lowrank.models import llama

    # With several buckets, gloo's threads start the hook's second all-reduces in another order on each rank, and they
    # fail, so PowerSGD has one.
    bucket = None if contender.power_rank is None else ONE_BUCKET
    network = DistributedDataParallel(llama.build(model, seed), bucket_cap_mb=bucket, gradient_as_bucket_view=True)
    if contender.power_rank is not None:
        state = powerSGD_hook.PowerSGDState(
            process_group=None, matrix_approximation_rank=contender.power_rank, start_powerSGD_iter=POWER_START
        )
        network.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

    def step(batches: Batches) -> float:
        total = 0.0
        for number, batch in enumerate(batches, start=1):
            with ExitStack() as stack:
                if number < len(batches):
                    stack.enter_context(network.no_sync())
                loss = network(input_ids=batch, labels=batch).loss / len(batches)
                loss.backward()
                total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


class Text:
    """The source of Python's standard library as bytes, cut into micro-batches of one sequence.

    Args:
        length: Tokens of a sequence.
        rank: This data-parallel rank, which has sequences of its own.
    """

    def __init__(self, length: int, rank: int) -> None:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        data = bytearray(b"".join(file.read_bytes() for file in files))
        self._tokens = torch.frombuffer(data, dtype=torch.uint8)
        self._length, self._rank, self._ranks = length, rank, dist.get_world_size()

    def batches(self, step: int, count: int) -> list[torch.Tensor]:
        """Return a step's micro-batches, each 1 x length, int64; other steps and ranks have others."""
        first = (step * self._ranks + self._rank) * MANY
        starts = [(first + number) * self._length % (len(self._tokens) - self._length) for number in range(count)]
        return [self._tokens[start : start + self._length].long().unsqueeze(0) for start in starts]
