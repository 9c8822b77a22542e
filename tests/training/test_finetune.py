"""Fine-tuning with real engines: every ZeRO stage, both tasks, resume, the best model, exports, LoRA."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.engines.pool import run_ranks
from tests.training.finetuning import CLASSES, EPOCH_STEPS, command_line, finetune, make_workspace, rows
from tests.training.runs import ROOT, TIMEOUT, deepspeed_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("finetuning"))


@pytest.fixture(scope="module")
def one_process(folder):
    """Two epochs by one process."""
    (result,) = run_ranks(1, finetune, command_line(folder, "one_process"))
    return result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def flops_of_a_token(record: dict) -> tuple[str, float]:
    """How they were found, and how many there are, with those of the padding."""
    return record["flops_source"], record["tflops_per_gpu"] / record["tokens_per_second_per_gpu"]


def test_it_learns_and_reports_every_metric(folder, one_process):
    records = one_process["records"]
    assert [record["step"] for record in records] == list(range(1, 2 * EPOCH_STEPS + 1))
    evaluated = [record["step"] for record in records if "eval_loss" in record]
    assert evaluated == [EPOCH_STEPS, 2 * EPOCH_STEPS]  # once an epoch
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    assert records[-1]["eval_accuracy"] > 0.8 and records[-1]["eval_mcc"] > 0.7
    assert {key for key in records[-1] if key.startswith("eval_")} == {"eval_loss", "eval_accuracy", "eval_mcc"}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_train_the_same_model_at_every_stage(folder, one_process, zero_stage):
    arguments = command_line(folder, f"stage{zero_stage}", config=deepspeed_config(zero_stage=zero_stage))
    results = run_ranks(2, finetune, arguments)
    for ours, theirs in zip(results[0]["records"], one_process["records"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for key in {"loss", "eval_loss", "grad_norm"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
        for key in {"eval_accuracy", "eval_mcc"} & theirs.keys():
            assert ours[key] == theirs[key]
    assert results[0]["best"] == results[1]["best"]
    torch.testing.assert_close(results[1]["logits"], one_process["logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("zero_stage", "optimizer", "lora"), [(2, "GaLore", ()), (3, "AdamW", ("--lora-rank", "2"))])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(folder, zero_stage, optimizer, lora):
    """RoBERTa has dropout, so the random states of both ranks must continue too."""
    config = deepspeed_config(optimizer, zero_stage)
    more = ("--model", str(folder / "roberta"), "--save-interval", "6", *lora)
    whole, again = f"whole{zero_stage}", f"again{zero_stage}"
    first = run_ranks(2, finetune, command_line(folder, whole, *more, config=config))[0]
    checkpoint = folder / whole / "checkpoints" / "global_step6"
    resume = (*more, "--save-interval", "0", "--resume", str(checkpoint))
    second = run_ranks(2, finetune, command_line(folder, again, *resume, config=config))[0]
    assert [record["step"] for record in second["records"]] == [7, 8]
    for ours, theirs in zip(second["records"], first["records"][6:], strict=True):
        for key in ("loss", "grad_norm", "lr", "tokens", "eval_loss", "eval_accuracy"):
            assert ours.get(key) == theirs.get(key), key
    ours, theirs = weights(folder / again / "export"), weights(folder / whole / "export")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("lora", "stage"), [((), 3), (("--lora-rank", "4"), 0)])
def test_fine_tuning_goes_on_with_other_ranks_and_another_stage(folder, lora, stage):
    """The LLaMA has no dropout, so the losses are the same up to the order of sums; LoRA has frozen weights too."""
    name = f"ranks{len(lora)}"
    more = ("--save-interval", "5", *lora)
    first = run_ranks(2, finetune, command_line(folder, name, *more, config=deepspeed_config(zero_stage=2)))[0]
    resume = (*lora, "--save-interval", "0", "--resume", str(folder / name / "checkpoints" / "global_step5"))
    config = deepspeed_config(zero_stage=stage)
    second = run_ranks(1, finetune, command_line(folder, f"{name}-on", *resume, config=config))[0]
    assert [record["step"] for record in second["records"]] == [6, 7, 8]
    for ours, theirs in zip(second["records"], first["records"][5:], strict=True):
        for key in {"loss", "grad_norm", "eval_loss"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_the_export_is_a_classifier_with_its_class_names(folder, one_process):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "one_process" / "export")
    assert model.config.id2label == dict(enumerate(CLASSES))
    tokenizer = AutoTokenizer.from_pretrained(folder / "one_process" / "export")
    held_out = rows(9, start=100)
    batch = tokenizer([row["text"] for row in held_out], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    right = sum(CLASSES[found] == row["label"] for found, row in zip(predicted, held_out, strict=True))
    assert right / 9 == pytest.approx(one_process["records"][-1]["eval_accuracy"])


def test_the_best_model_is_kept_though_the_run_goes_on_to_worse(folder):
    rates = {"warmup_min_lr": 1e-3, "warmup_max_lr": 1.0, "warmup_num_steps": 8, "warmup_type": "linear"}
    config = deepspeed_config(scheduler={"type": "WarmupLR", "params": rates})
    arguments = command_line(folder, "worse", "--eval-interval", "1", "--best-metric", "loss", config=config)
    (result,) = run_ranks(1, finetune, arguments)
    value, step = min((record["eval_loss"], record["step"]) for record in result["records"])
    assert 1 < step < 8, "the best is the first or the last: the test tests nothing"
    kept = json.loads((folder / "worse" / "best" / "best.json").read_text())
    assert kept == result["best"] == {"metric": "loss", "value": value, "step": step}
    model = AutoModelForSequenceClassification.from_pretrained(folder / "worse" / "best")
    assert not torch.equal(model.score.weight, weights(folder / "worse" / "export")["score.weight"])
    assert AutoTokenizer.from_pretrained(folder / "worse" / "best").eos_token == "<|endoftext|>"


def test_completions_alone_are_learnt_and_every_token_weighs_the_same(folder):
    """On two ranks, in micro-batches of other lengths, as on one."""
    columns = ("--task", "causal-lm", "--prompt-column", "text", "--completion-column", "label")
    one = run_ranks(1, finetune, command_line(folder, "lm1", *columns, "--micro-batch-size", "8"))[0]
    two = run_ranks(2, finetune, command_line(folder, "lm2", *columns))[0]
    assert one["records"][-1]["eval_perplexity"] < one["records"][EPOCH_STEPS - 1]["eval_perplexity"] < 300
    assert one["best"]["metric"] == "perplexity"
    for ours, theirs in zip(two["records"], one["records"], strict=True):
        for key in {"loss", "grad_norm", "eval_loss"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    AutoModelForCausalLM.from_pretrained(folder / "lm2" / "export")


@pytest.mark.parametrize("rank", [4, 8])
def test_regression_on_text_pairs_with_glue_settings(folder, rank):
    config = json.loads((ROOT / "ds_configs" / "glue" / f"galore_rank{rank}.json").read_text())
    columns = ("--text-column", "text", "other", "--label-column", "number")
    more = ("--model", str(folder / "roberta"), *columns, "--lr", "3e-2", "--schedule", "linear", "--warmup", "0")
    arguments = command_line(folder, f"regression{rank}", *more, "--eval-interval", "8", config=config, epochs=8)
    result = run_ranks(2, finetune, arguments)[0]
    assert [record["lr"] for record in result["records"]] == pytest.approx([3e-2 * (1 - k / 16) for k in range(16)])
    assert result["records"][0]["lowrank/projected_matrices"] == 2 * 6
    assert result["records"][0]["lowrank/mean_rank"] == rank
    assert result["best"]["metric"] == "pearson"
    assert result["records"][-1]["eval_loss"] < 1.0 < result["records"][0]["loss"]
    assert {"eval_loss", "eval_pearson", "eval_spearman"} <= result["records"][-1].keys()
    model = AutoModelForSequenceClassification.from_pretrained(folder / f"regression{rank}" / "export")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_a_llama_with_random_weights_needs_no_checkpoint(folder):
    more = ("--model", str(folder / "model.json"), "--tokenizer", "bytes")
    (one,) = run_ranks(1, finetune, command_line(folder, "random", *more, epochs=1))
    sharded = deepspeed_config(zero_stage=3)
    (three,) = run_ranks(1, finetune, command_line(folder, "random3", *more, config=sharded, epochs=1))
    assert three["records"][0]["loss"] == pytest.approx(one["records"][0]["loss"], rel=1e-5)
    sources, per_token = zip(*(flops_of_a_token(result["records"][0]) for result in (one, three)), strict=True)
    assert sources == ("torch's counter",) * 2 and per_token[0] == pytest.approx(per_token[1], rel=1e-12)


@pytest.mark.parametrize(("zero_stage", "task"), [(1, "causal-lm"), (3, "classification")])
def test_lora_is_exported_as_the_plain_model_that_it_computes(folder, zero_stage, task):
    output = f"lora-{task}-{zero_stage}"
    config = deepspeed_config("AdamW", zero_stage)
    more = ("--task", task, "--lora-rank", "4", "--lora-alpha", "8")
    result = run_ranks(2, finetune, command_line(folder, output, *more, config=config))[0]
    # Four attention and three MLP matrices in two layers, and the head of a classifier.
    assert result["trainable_parameters"] == 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64)) + (
        96 if task != "causal-lm" else 0
    )
    assert result["records"][-1]["loss"] < result["records"][0]["loss"]
    assert result["records"][0]["flops_source"] == "torch's counter" and result["records"][0]["tflops_per_gpu"] > 0
    auto = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    model = auto.from_pretrained(folder / output / "export")
    with torch.no_grad():
        logits = model(torch.arange(2 * 8).reshape(2, 8) + 40).logits
    torch.testing.assert_close(logits, result["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_matrices_of_a_dense_optimizer_have_their_own_rate(folder, zero_stage):
    """At a rate of zero they stay as they are, and everything else is trained."""
    config, output = deepspeed_config("AdamW", zero_stage), f"two-rates-{zero_stage}"
    run_ranks(2, finetune, command_line(folder, output, "--matrix-lr-scale", "0", config=config, epochs=1))
    start, end = (
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=3).state_dict()
        for path in (folder / "llama", folder / output / "export")
    )
    still = {name for name in start if torch.equal(start[name], end[name])}
    assert still == {name for name in start if "_proj" in name}


METHODS = {
    "adapter": {"type": "GradNormLoRP", "params": {"rank": 2, "parametrization": "adapter", "adapter_rank": 4}},
    "full": {"type": "GradNormLoRP", "params": {"rank": 4}},
    "ascent": {"type": "Lorenza", "params": {"rank": 4}},
}


@pytest.mark.parametrize(("method", "zero_stage"), [("adapter", 3), ("full", 2), ("ascent", 1)])
def test_finetune_with_adapters_full_weights_and_lorenza(folder, method, zero_stage):
    """The export is a plain model that computes what the trained one does."""
    config = deepspeed_config(zero_stage=zero_stage) | {"optimizer": METHODS[method]}
    result = run_ranks(2, finetune, command_line(folder, method, "--lr", "0.01", config=config))[0]
    assert result["records"][-1]["loss"] < result["records"][0]["loss"]
    assert (result["trainable_parameters"] < 30336) == (method == "adapter")
    assert result["records"][0]["flops_source"] == ("6N + attention" if method == "adapter" else "torch's counter")
    model = AutoModelForSequenceClassification.from_pretrained(folder / method / "export")
    with torch.no_grad():
        logits = model(torch.arange(2 * 8).reshape(2, 8) + 40).logits
    torch.testing.assert_close(logits, result["logits"], rtol=1e-5, atol=1e-5)


def test_the_script_leaves_what_a_run_leaves(folder):
    """By torchrun on two ranks."""
    arguments = [*command_line(folder, "script", "--save-interval", "8"), "--export"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = [sys.executable, *launcher, str(ROOT / "launch" / "finetune.py"), *arguments]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    assert run.returncode == 0, run.stderr
    assert {path.name for path in (folder / "script").iterdir()} == {
        *(".checkpoints", "best", "checkpoints", "export", "loss.png", "metrics.jsonl", "summary.json"),
    }
    summary = json.loads((folder / "script" / "summary.json").read_text())
    assert summary["finished"] and summary["best"]["metric"] == "accuracy" and summary["trainable_parameters"] > 10000
    assert "step 8/8 | loss" in run.stdout and "eval accuracy" in run.stdout
    assert "new, not from the checkpoint: score.weight" in run.stdout
