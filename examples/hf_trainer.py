"""Train with GaLore at ZeRO 2 through the Hugging Face Trainer: two lines more than without.

    python examples/hf_trainer.py
    deepspeed --num_gpus 2 examples/hf_trainer.py    # prints the same losses

``register()`` makes the methods known, and the DeepSpeed configuration of ``TrainingArguments`` names one; the Trainer
fills in what is ``"auto"``. It trains, evaluates, saves and loads the best checkpoint. Runs on a CPU in seconds. Needs
``pip install ".[train,huggingface]"``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ds_lowrank
from ds_lowrank.training.distributed import join, leave

CONFIG = Path(__file__).parents[1] / "ds_configs" / "hf_galore_zero2.json"
VOCAB, LENGTH = 64, 16


class Counting(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences that count in steps of one to four, modulo the vocabulary.

    Args:
        size: how many.
        seed: of where they start.
    """

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(VOCAB, (size, 1), generator=generator)
        stride = torch.randint(1, 5, (size, 1), generator=generator)
        self._rows = (start + stride * torch.arange(LENGTH)) % VOCAB

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def make_model() -> LlamaForCausalLM:
    """A LLaMA with two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=LENGTH))


def train(output: str = "runs/hf_trainer", ranks: int = 1) -> Any:
    """Train for 100 steps of 64 sequences and return the Trainer."""
    ds_lowrank.register()
    config = json.loads(CONFIG.read_text())
    config["optimizer"]["params"] |= {"rank": 16, "update_proj_gap": 50, "scale": 1.0}  # for a model of this size
    arguments = TrainingArguments(
        output_dir=output,
        deepspeed=config,
        max_steps=100,
        per_device_train_batch_size=32 // ranks,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        eval_strategy="steps",
        eval_steps=50,
        save_steps=50,
        save_total_limit=2,
        load_best_model_at_end=True,
        train_sampling_strategy="sequential",  # the same order on any number of ranks
        logging_steps=20,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=make_model(), args=arguments, train_dataset=Counting(6400, 0), eval_dataset=Counting(256, 1)
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    join()  # one process, deepspeed or torchrun; with GPUs transformers does it itself
    train(ranks=torch.distributed.get_world_size())
    leave()
