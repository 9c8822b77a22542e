"""Fine-tune with GaLore at ZeRO 2 through TRL's ``SFTTrainer``, with the loss on the completions only.

    python examples/trl_sft.py
    deepspeed --num_gpus 2 examples/trl_sft.py    # prints the same losses

As with the Trainer: ``register()``, and a DeepSpeed configuration that names the method. The model and the tokenizer
are made here, so nothing is downloaded. Runs on a CPU in seconds. Needs ``pip install ".[train,huggingface]"``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import ds_lowrank
from ds_lowrank.training.distributed import join, leave

CONFIG = Path(__file__).parents[1] / "ds_configs" / "hf_galore_zero2.json"
NUMBERS = 20


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = ["<pad>", "<eos>", "plus", "is", *map(str, range(2 * NUMBERS))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """A LLaMA with two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=vocab_size, max_position_embeddings=16))


def make_sums() -> Dataset:
    """Sums of two numbers: what to say, and what to answer. Rows of equal length, so that ranks share them evenly."""
    pairs = torch.randint(NUMBERS, (6400, 2), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_list(
        [{"prompt": f"{first} plus {second} is", "completion": f" {first + second}"} for first, second in pairs]
    )


def train(output: str = "runs/trl_sft", ranks: int = 1) -> Any:
    """Train for 100 steps of 64 examples and return the SFTTrainer."""
    ds_lowrank.register()
    config = json.loads(CONFIG.read_text())
    config["optimizer"]["params"] |= {"rank": 16, "update_proj_gap": 50, "scale": 1.0}  # for a model of this size
    tokenizer = make_tokenizer()
    arguments = SFTConfig(
        output_dir=output,
        deepspeed=config,
        max_steps=100,
        per_device_train_batch_size=64 // ranks,
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,  # SFTConfig's default is True
        train_sampling_strategy="sequential",  # the same order on any number of ranks
        save_strategy="no",
        logging_steps=20,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model=make_model(len(tokenizer)), args=arguments, train_dataset=make_sums(), processing_class=tokenizer
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    join()  # one process, deepspeed or torchrun; with GPUs transformers does it itself
    train(ranks=torch.distributed.get_world_size())
    leave()
