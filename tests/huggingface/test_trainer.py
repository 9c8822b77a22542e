"""The Hugging Face Trainer takes the steps of our own engine: stages, dtypes, accumulation, methods, resume, PEFT."""

from __future__ import annotations

import json

import pytest
import torch

from ds_lowrank.methods import METHODS as REGISTRY
from tests.engines.pool import run_ranks
from tests.engines.scenario import make_model, train_step
from tests.huggingface.scenario import (
    CONFIGS,
    STEPS,
    Rows,
    arguments,
    hf_config,
    max_difference,
    own_config,
    train_with_own_engine,
    train_with_trainer,
)

pytestmark = pytest.mark.slow

CASES = [
    # stage, ranks, dtype, gas
    (0, 2, "fp32", 2),
    (1, 2, "fp32", 1),
    (1, 2, "bf16", 2),
    (2, 1, "fp32", 2),
    (2, 2, "bf16", 1),
    (2, 2, "fp32", 2),
    (3, 1, "bf16", 1),
    (3, 2, "fp32", 2),
    (3, 2, "bf16", 2),
]


@pytest.mark.parametrize(("stage", "ranks", "dtype", "gas"), CASES)
def test_ten_steps_are_those_of_our_own_engine(tmp_path, stage, ranks, dtype, gas):
    """With clipping and a scheduler. The same numbers are added in the same order: the weights have the same bits."""
    got = run_ranks(ranks, train_with_trainer, tmp_path, stage, gas, bf16=dtype == "bf16")
    own = run_ranks(ranks, train_with_own_engine, own_config(stage, ranks, gas, dtype=dtype), gas)
    assert max_difference(got[0]["weights"], own[0]["weights"]) == 0
    logged = [record["loss"] for record in got[0]["log"] if "loss" in record]
    # A log step's loss is the mean over ranks and micro-batches; in bf16 the model's loss has three digits.
    every = torch.tensor([result["losses"] for result in own], device="cpu").view(ranks, STEPS, gas)
    assert logged == pytest.approx(every.mean(dim=(0, 2)).tolist(), rel=1e-5 if dtype == "fp32" else 1e-2)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_weights_without_fp32_copies_are_those_of_our_own_engine(tmp_path, stage):
    config = hf_config(stage, master_weights=False)
    got = run_ranks(2, train_with_trainer, tmp_path, stage, 2, bf16=True, deepspeed=config)
    settings = own_config(stage, 2, 2, dtype="bf16")
    settings["optimizer"]["params"]["master_weights"] = False
    own = run_ranks(2, train_with_own_engine, settings, 2)
    assert max_difference(got[0]["weights"], own[0]["weights"]) == 0
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in got[0]["weights"].values())


METHODS = sorted(set(REGISTRY) - {"Lorenza"})
"""What trains with separate forward and backward passes; for LORENZA see test_lorenza.py."""


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_the_steps_of_our_own_engine(tmp_path, method):
    config = hf_config(2, method)
    params = own_config(2, 2, method=method)["optimizer"]["params"]
    eps, betas = params.get("eps", 1e-8), params.get("betas", (0.9, 0.999))
    config["optimizer"]["params"] |= {"eps": eps, "betas": list(betas)}
    adam = {"adam_epsilon": eps, "adam_beta1": betas[0], "adam_beta2": betas[1]}
    got = run_ranks(2, train_with_trainer, tmp_path, 2, deepspeed=config, **adam)
    own = run_ranks(2, train_with_own_engine, own_config(2, 2, method=method))
    assert max_difference(got[0]["weights"], own[0]["weights"]) == 0


def train_and_resume(folder, stage, ranks):
    """Twelve steps with evaluation and saving; again from the first checkpoint; weights, logs and the best model."""
    import torch.distributed as dist
    from transformers import Trainer

    import ds_lowrank
    from tests.engines.scenario import full_weights

    ds_lowrank.register()
    results = []
    for checkpoint in (None, str(folder / "run" / "checkpoint-4")):
        options = {
            "max_steps": 12,
            "save_strategy": "steps",
            "save_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 4,
        }
        options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "per_device_eval_batch_size": 4}
        own = arguments(folder / ("run" if checkpoint is None else "resumed"), stage, ranks, **options)
        trainer = Trainer(model=make_model(), args=own, train_dataset=Rows(12), eval_dataset=Rows(1))
        trainer.train(resume_from_checkpoint=checkpoint)
        log = [
            {k: r[k] for k in ("step", "loss", "eval_loss", "grad_norm") if k in r} for r in trainer.state.log_history
        ]
        results.append(
            {
                "weights": full_weights(trainer.model_wrapped),
                "log": [record for record in log if len(record) > 1],
                "best": trainer.state.best_model_checkpoint,
                "last": trainer.evaluate()["eval_loss"],
            }
        )
        dist.barrier()
    return results


@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (2, 2), (3, 2), (3, 1)])
def test_a_resumed_run_is_the_uninterrupted_one_and_the_best_model_is_loaded(tmp_path, stage, ranks):
    whole, resumed = run_ranks(ranks, train_and_resume, tmp_path, stage, ranks)[0]
    assert max_difference(resumed["weights"], whole["weights"]) == 0
    assert resumed["log"] == whole["log"]
    evaluations = {record["step"]: record["eval_loss"] for record in whole["log"] if "eval_loss" in record}
    assert set(evaluations) == {4, 8, 12}
    best = min(evaluations, key=evaluations.__getitem__)
    assert whole["best"].endswith(f"checkpoint-{best}")
    assert whole["last"] == pytest.approx(evaluations[best], rel=1e-6)  # of the best model, evaluated once more


def train_peft(folder, stage, method, own_engine):
    """Ten steps on PEFT's LoRA factors, by the Trainer or by our own engine."""
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, get_linear_schedule_with_warmup

    import ds_lowrank
    from tests.engines.scenario import full_weights

    ranks = dist.get_world_size()
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(make_model(), LoraConfig(r=8, target_modules=targets, lora_dropout=0.0))
    if not own_engine:
        ds_lowrank.register()
        config = hf_config(stage, method, rank=4)
        trainer = Trainer(
            model=model, args=arguments(folder, stage, ranks, deepspeed=config), train_dataset=Rows(STEPS)
        )
        trainer.train()
        engine = trainer.model_wrapped
    else:
        config = own_config(stage, ranks, method=method)
        config["optimizer"]["params"]["rank"] = 4
        engine, *_ = ds_lowrank.initialize(
            model=model,
            config=config,
            lr_scheduler=lambda optimizer: get_linear_schedule_with_warmup(optimizer, 2, STEPS),
        )
        for step in range(STEPS):
            train_step(engine, step)
    weights = {name: weight for name, weight in full_weights(engine).items() if "lora" in name}
    return weights, engine.basic_optimizer.metrics()["lowrank/projected_matrices"]


@pytest.mark.parametrize(("stage", "method"), [(2, "GaLore"), (3, "GradNormLoRP")])
def test_the_factors_of_pefts_adapters_are_trained_as_by_our_own_engine(tmp_path, stage, method):
    got, projected = run_ranks(2, train_peft, tmp_path, stage, method, False)[0]
    own, _ = run_ranks(2, train_peft, tmp_path, stage, method, True)[0]
    assert max_difference(got, own) == 0
    assert projected == 2 * 3 * 2  # A and B of three matrices in two layers
    assert all(weight.any() for weight in got.values())  # B starts at zero


def train_pretrained(folder, stage):
    """Ten steps of a model that ``from_pretrained`` loads, at ZeRO 3 into partitions; whether it did so."""
    import torch.distributed as dist
    from transformers import LlamaForCausalLM, Trainer

    import ds_lowrank
    from tests.engines.scenario import full_weights

    ds_lowrank.register()
    own = arguments(folder, stage, dist.get_world_size())
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    is_partitioned = all(hasattr(parameter, "ds_shape") for parameter in model.parameters())
    trainer = Trainer(model=model, args=own, train_dataset=Rows(STEPS))
    trainer.train()
    return is_partitioned, full_weights(trainer.model_wrapped)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_that_from_pretrained_has_loaded_takes_the_same_steps(tmp_path, stage):
    make_model().save_pretrained(tmp_path / "model")
    own = run_ranks(2, train_with_own_engine, own_config(stage, 2))
    for is_partitioned, weights in run_ranks(2, train_pretrained, tmp_path, stage):
        assert is_partitioned == (stage == 3)
        assert max_difference(weights, own[0]["weights"]) == 0


def train_by_path(folder, path):
    """A step with a shipped configuration, named by its path as on a command line; what was projected."""
    from transformers import Trainer

    import ds_lowrank

    ds_lowrank.register()
    own = arguments(folder, 2, 1, deepspeed=path, max_steps=1, per_device_train_batch_size=4)
    trainer = Trainer(model=make_model(hidden=64, intermediate=96), args=own, train_dataset=Rows(1))
    trainer.train()
    return trainer.model_wrapped.basic_optimizer.metrics()["lowrank/projected_matrices"]


@pytest.mark.parametrize("name", ["hf_galore_zero2.json", "hf_galore_zero3.json"])
def test_the_shipped_configurations_train_as_they_are(tmp_path, name):
    assert run_ranks(1, train_by_path, tmp_path, str(CONFIGS / name)) == [2 * 7]


def test_the_shipped_configurations_are_galores_with_auto_values():
    for stage in (2, 3):
        config = json.loads((CONFIGS / f"hf_galore_zero{stage}.json").read_text())
        assert config["zero_optimization"]["stage"] == stage
        params = config["optimizer"]["params"]
        assert [key for key, value in params.items() if value == "auto"] == ["lr", "betas", "eps", "weight_decay"]
