"""Runs of launch/finetune.py on checkpoints that step in milliseconds, most of them in the calling process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.training.runs import MODEL, deepspeed_config

WORDS = ("red", "green", "blue")
CLASSES = ("cold", "hot", "warm")
EPOCH_STEPS = 4


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows whose label follows from a word of the text; each also has a second text and a number."""
    return [
        {
            "text": "so " * (number % 4) + f"{number} is {WORDS[number % 3]}",
            "other": f"and {number * 7 % 10}",
            "label": CLASSES[number % 3],
            "number": number % 3 + 0.5,
        }
        for number in range(start, start + count)
    ]


def write_jsonl(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def make_checkpoints(folder: Path) -> None:
    """Write ``llama``, as launch/pretrain.py exports it, and ``roberta``, a masked-LM encoder, with tokenizers."""
    from transformers import LlamaConfig, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

    from ds_lowrank.data.tokenizer import load_tokenizer
    from ds_lowrank.models.llama import build

    tokenizer = load_tokenizer("bytes", lambda: iter(()), cache_dir=folder)
    build(LlamaConfig(**MODEL, use_cache=False), 0).save_pretrained(folder / "llama")
    tokenizer.save(folder / "llama")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=300, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, **sizes)
    RobertaForMaskedLM(config).save_pretrained(folder / "roberta")
    special = PreTrainedTokenizerFast(tokenizer_object=tokenizer.tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    special.add_special_tokens({"pad_token": "<pad>", "sep_token": "</s>", "cls_token": "<s>"})
    special.save_pretrained(folder / "roberta")
    (folder / "model.json").write_text(json.dumps(MODEL))


def make_workspace(folder: Path) -> Path:
    make_checkpoints(folder)
    write_jsonl(folder / "train.jsonl", rows(8 * EPOCH_STEPS + 3))
    write_jsonl(folder / "validation.jsonl", rows(9, start=100))
    return folder


def command_line(
    folder: Path, output: str, *more: str, config: dict[str, Any] | None = None, epochs: int = 2
) -> list[str]:
    path = folder / f"{output}.json"
    path.write_text(json.dumps(config or deepspeed_config()))
    return [
        *("--deepspeed_config", str(path), "--model", str(folder / "llama"), "--max-length", "32"),
        *("--data", str(folder / "train.jsonl"), "--validation", str(folder / "validation.jsonl")),
        *("--epochs", str(epochs), "--log-interval", "1", "--save-interval", "0", "--cache", str(folder / "cache")),
        *("--output", str(folder / output), *more),
    ]


def finetune(arguments: list[str]) -> dict[str, Any]:
    """Run one rank; return the records, the summary's facts, and the logits of a fixed batch."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from ds_lowrank.checkpoint.export import export
    from ds_lowrank.finetuning.arguments import parse
    from ds_lowrank.finetuning.setup import set_up
    from ds_lowrank.training.records import read_metrics
    from ds_lowrank.training.time_limits import TimeLimits
    from ds_lowrank.training.train import train

    disable_progress_bar()
    parsed = parse(arguments)
    run = set_up(parsed)
    assert train(run, TimeLimits(parsed.timeout, parsed.setup_timeout))
    export(run.engine, run.tokenizer, parsed.output / "export")
    run.engine.eval()
    with torch.no_grad():
        logits = run.engine(input_ids=torch.arange(2 * 8).reshape(2, 8) + 40).logits
    return {"records": read_metrics(parsed.output / "metrics.jsonl"), "logits": logits, **run.facts()}


def set_up_error(arguments: list[str]) -> str:
    """The message of the error that this rank raises before the first step."""
    from ds_lowrank.collectives import RemoteError
    from ds_lowrank.finetuning.arguments import parse
    from ds_lowrank.finetuning.setup import set_up

    try:
        set_up(parse(arguments))
    except (ValueError, OSError, RemoteError) as error:
        return str(error)
    return "nothing refused"
