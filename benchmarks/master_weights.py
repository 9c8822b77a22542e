"""Loss with weights in bf16 alone, rounded stochastically, against weights in bf16 with fp32 copies.

python -m benchmarks.master_weights

A small LLaMA learns to predict the bytes of the standard library's source, with GaLore on one rank at ZeRO 0, each run
on one core. *off* is the relative difference of the last held-out loss from the run with fp32 copies of the same
rate and seed. The second table is at a rate so small that a step moves a weight by a fraction of a unit in the last
place: *kept* is how much of the movement with fp32 copies is there without, ``<D, D0> / <D0, D0>`` over all weights.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Numbers, options, report
from benchmarks.ranks import on_ranks

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "use_cache": False,
}
LENGTH, BATCH, HELD_OUT = 96, 12, 192
"""Bytes of a sequence, sequences of a step, sequences that the loss is taken of."""
METHOD: dict[str, Any] = {"rank": 24, "update_proj_gap": 50}
BYTES = 2**22
"""Of the source: enough for every sequence to be a new one."""
SMALL_LR = 1e-5
KINDS = ("fp32 copies", "stochastic", "nearest")


def source(held_out: bool) -> torch.Tensor:
    """Return bytes of the standard library: every twentieth file is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    chosen = [file for number, file in enumerate(files) if (number % 20 == 0) == held_out]
    data = b"".join(file.read_bytes() for file in chosen)[:BYTES]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def batches(data: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield size x LENGTH bytes from random places, int64."""
    drawn = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(data) - LENGTH, (size,), generator=drawn)
        yield torch.stack([data[start : start + LENGTH] for start in starts.tolist()]).long()


Weights = list[torch.Tensor]
Step = Callable[[torch.Tensor], None]


def trainer(kind: str, lr: float, seed: int) -> tuple[torch.nn.Module, Weights, Step]:
    """Return a model in bf16, what is stored of its weights most exactly, and what takes a step. Collective.

    Args:
        kind: One of ``KINDS``: weights and their fp32 copies by DeepSpeed; weights alone, rounded stochastically; the
            same rounded to the nearest, for which an optimizer has no engine.
        lr: The learning rate.
        seed: Seed of the weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    import ds_lowrank

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=LENGTH))
    if kind == "nearest":
        optimizer = ds_lowrank.GaLore(model.bfloat16(), lr=lr, **METHOD)

        def plain_step(batch: torch.Tensor) -> None:
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return model, list(model.parameters()), plain_step
    params = {"lr": lr, **METHOD, "master_weights": kind == "fp32 copies"}
    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "GaLore", "params": params},
    }
    engine, *_ = ds_lowrank.initialize(model=model, config=config)

    def step(batch: torch.Tensor) -> None:
        ds_lowrank.forward_backward(engine, lambda: engine(input_ids=batch, labels=batch).loss)
        engine.step()

    if kind == "fp32 copies":
        wrapper = engine.optimizer
        (low,), (high,) = wrapper.fp16_groups, wrapper.fp32_groups
        copies = {id(one): copy for one, copy in zip(low, high, strict=True)}
        return model, [copies[id(parameter)] for parameter in model.parameters()], step
    return model, list(model.parameters()), step


def train(kind: str, lr: float, seed: int, steps: int) -> tuple[float, Weights]:
    """Return the held-out loss after some steps, and how far each parameter has moved, in fp32."""
    model, weights, step = trainer(kind, lr, seed)
    start = [weight.detach().float().clone() for weight in weights]
    stream = batches(source(held_out=False), BATCH, seed)
    for _ in range(steps):
        step(next(stream))
    batch = next(batches(source(held_out=True), HELD_OUT, 0))
    with torch.no_grad():
        loss = float(model(input_ids=batch, labels=batch).loss)
    print(f"{kind}, rate {lr:g}, seed {seed}: {loss:.4f}", file=sys.stderr, flush=True)
    return loss, [weight.detach().float() - before for weight, before in zip(weights, start, strict=True)]


def losses(rates: list[float], seeds: list[int], steps: int) -> Numbers:
    """Return one record per rate and seed."""
    rows: Numbers = []
    for lr, seed in product(rates, seeds):
        (kept, _), (alone, _) = (train(kind, lr, seed, steps) for kind in KINDS[:2])
        row = {"lr": lr, "seed": seed, "steps": steps, "loss with fp32 copies": kept, "loss without": alone}
        rows.append({**row, "off": alone / kept - 1})
    return rows


def small_updates(seed: int, steps: int) -> Numbers:
    """Return one record per kind of weights, at the small rate."""
    rows: Numbers = []
    reference: Weights = []
    for kind in KINDS:
        loss, moved = train(kind, SMALL_LR, seed, steps)
        reference = reference or moved
        dot = sum(float((a * b).double().sum()) for a, b in zip(moved, reference, strict=True))
        square = sum(float(b.double().square().sum()) for b in reference)
        elements = sum(a.numel() for a in moved)
        changed = sum(int((a != 0).sum()) for a in moved) / elements
        rows.append(
            {"weights": kind, "lr": SMALL_LR, "steps": steps, "loss": loss, "changed": changed, "kept": dot / square}
        )
    return rows


def measure(rates: list[float], seeds: list[int], steps: int, small_steps: int) -> list[Numbers]:
    """Return both tables, the second one first, as it is short."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.disable(logging.WARNING)
    found = small_updates(seeds[0], small_steps)
    return [losses(rates, seeds, steps), found]


def main() -> None:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--small-steps", type=int, default=60, help="at the small rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 1e-2])
    arguments: argparse.Namespace = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(steps=5, small_steps=5, seeds=1)
    seeds = list(range(arguments.seed, arguments.seed + arguments.seeds))
    rows, small = on_ranks(1, measure, arguments.rates, seeds, arguments.steps, arguments.small_steps)
    report(rows, arguments, small_updates=small)


if __name__ == "__main__":
    main()
