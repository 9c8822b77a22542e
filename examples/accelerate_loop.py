"""Train with GaLore at ZeRO 2 in a loop of accelerate.

    accelerate launch --config_file examples/accelerate_zero2.yaml examples/accelerate_loop.py

The YAML names a DeepSpeed configuration, which names the method. accelerate fills in ``lr``, ``weight_decay`` and the
batch sizes; ``DummyOptim`` stands for the optimizer that DeepSpeed builds. Runs on two CPU cores in seconds. Needs
``pip install ".[train,huggingface]"``.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DummyOptim, DummyScheduler
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

import ds_lowrank
from ds_lowrank.training.distributed import join, leave

VOCAB, LENGTH, BATCH, STEPS = 64, 16, 64, 100


def make_model() -> LlamaForCausalLM:
    """A LLaMA with two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=LENGTH))


def make_rows() -> torch.Tensor:
    """Sequences that count in steps of one to four, modulo the vocabulary; 64 for each step."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(VOCAB, (STEPS * BATCH, 1), generator=generator)
    stride = torch.randint(1, 5, (STEPS * BATCH, 1), generator=generator)
    return (start + stride * torch.arange(LENGTH)) % VOCAB


def train() -> Any:
    """Train, print the mean loss over all ranks, and return the engine."""
    ds_lowrank.register()
    if not torch.cuda.is_available():
        PartialState(cpu=True)  # else accelerate takes ranks without GPUs for one process
    accelerator = Accelerator()
    gas = accelerator.gradient_accumulation_steps = accelerator.deepspeed_plugin.get_value(
        "gradient_accumulation_steps"
    )
    # A list of rows: accelerate's loader gives every second batch to each of two ranks.
    loader: Any = torch.utils.data.DataLoader(
        list(make_rows()),  # type: ignore[arg-type]
        batch_size=BATCH // gas // accelerator.num_processes,
    )
    model: Any = make_model()
    optimizer: Any = DummyOptim(model.parameters(), lr=0.01)
    scheduler: Any = DummyScheduler(
        optimizer, lr_scheduler_callable=lambda built: get_cosine_schedule_with_warmup(built, 10, STEPS)
    )
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses = []
    for number, batch in enumerate(loader, 1):
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if number % (20 * gas) == 0:
            mean = accelerator.reduce(torch.stack(losses[-gas:]).mean(), reduction="mean")
            accelerator.print(f"step {number // gas:3}  loss {mean.item():.4f}")
    accelerator.print(model.basic_optimizer.metrics())
    return model


if __name__ == "__main__":
    join()  # with GPUs accelerate does it itself
    train()
    leave()
