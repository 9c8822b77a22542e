"""The optimizer that was chosen is the one that trains, or an error says why not: every way to choose one."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, make_model, tokens
from tests.huggingface.scenario import LR, STEPS, Rows, arguments, hf_config, max_difference

pytestmark = pytest.mark.slow


def options():
    return {**METHODS["GaLore"], "lr": LR}


def outcome(folder, way, config=None, **settings):
    """The class that trains, or the first error, of a Trainer that gets its optimizer in one of several ways."""
    import torch.distributed as dist
    from transformers import Trainer

    import ds_lowrank

    if way != "unregistered":
        ds_lowrank.register()
    messages = []
    logging.disable(logging.NOTSET)  # the pool switches warnings off
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("ds_lowrank").addHandler(handler)
    own = arguments(folder, 2, dist.get_world_size(), deepspeed=config, max_steps=1, **settings)
    model, given = make_model(), {}
    if way == "factory":
        given["optimizer_cls_and_kwargs"] = (lambda: ds_lowrank.GaLore, options())
    if way in ("optimizers", "unregistered"):
        given["optimizers"] = (ds_lowrank.GaLore(model, **options()), None)
    trainer = Trainer(model=model, args=own, train_dataset=Rows(1), **given)
    try:
        trainer.train()
    except ValueError as error:
        return f"{type(error).__name__}: {error}", messages
    return type(trainer.model_wrapped.basic_optimizer).__name__, messages


def without_optimizer():
    config = hf_config(2)
    del config["optimizer"]
    return config


def test_a_factory_and_the_configuration_are_both_obeyed(tmp_path):
    assert [name for name, _ in run_ranks(2, outcome, tmp_path, "factory", without_optimizer())] == ["GaLore"] * 2
    assert [name for name, _ in run_ranks(2, outcome, tmp_path, "named", hf_config(2))] == ["GaLore"] * 2


def test_two_optimizers_are_refused_on_every_rank(tmp_path):
    for error, _ in run_ranks(2, outcome, tmp_path, "factory", hf_config(2)):
        assert error.startswith("ConfigError: optimizer_cls_and_kwargs was passed to the Trainer, and the DeepSpeed")
    for error, _ in run_ranks(2, outcome, tmp_path, "named", hf_config(2), optim="galore_adamw"):
        assert error.startswith("ConfigError: TrainingArguments.optim is 'galore_adamw', and the DeepSpeed")


def test_an_optimizer_that_the_trainer_drops_is_refused_and_without_register_warned_of(tmp_path):
    for error, messages in run_ranks(2, outcome, tmp_path, "optimizers", without_optimizer()):
        assert error.startswith("ConfigError: GaLore was built for this model, and DeepSpeed is about to train it with")
        assert any("would drop it and train with AdamW" in message for message in messages)
    for name, messages in run_ranks(2, outcome, tmp_path, "unregistered", without_optimizer()):
        assert name != "GaLore"  # nothing of ours is called by then
        assert any("would drop it and train with AdamW" in message for message in messages)


def train_with_adamw_after_all():
    """The loss of a step of AdamW, by a program that has built a GaLore before and not used it."""
    import ds_lowrank
    from tests.engines.scenario import config

    ds_lowrank.register()
    model = make_model()
    ds_lowrank.GaLore(model, **options())
    settings = config(2, 1) | {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    engine, *_ = ds_lowrank.initialize(model=model, config=settings)
    engine.backward(engine(input_ids=tokens(0), labels=tokens(0)).loss)
    engine.step()
    return type(engine.basic_optimizer).__name__


def test_a_program_without_a_trainer_may_change_its_mind():
    assert run_ranks(1, train_with_adamw_after_all) == ["AdamW"]


def test_accelerate_refuses_an_auto_that_the_trainer_cannot_fill_in(tmp_path):
    for error, _ in run_ranks(2, outcome, tmp_path, "named", hf_config(2, update_proj_gap="auto")):
        assert "specify `optimizer.params.update_proj_gap` without `auto`" in error


def train_without_deepspeed(folder, gas):
    """Ten steps by a Trainer without DeepSpeed, under DDP where there are several ranks."""
    import os

    import torch.distributed as dist
    from transformers import Trainer, TrainingArguments

    import ds_lowrank

    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29411"}
    own = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=24 // ranks // gas,
        gradient_accumulation_steps=gas,
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_grad_norm=0.5,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=make_model(),
        args=own,
        train_dataset=Rows(STEPS),
        optimizer_cls_and_kwargs=(lambda: ds_lowrank.GaLore, options()),
    )
    trainer.train()
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


@pytest.mark.parametrize(("ranks", "gas"), [(1, 2), (2, 1)])
def test_without_deepspeed_a_factory_takes_the_steps_of_the_optimizer_alone(tmp_path, ranks, gas):
    from transformers import get_linear_schedule_with_warmup

    import ds_lowrank

    model = make_model()
    optimizer = ds_lowrank.GaLore(model, **options())
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    expected = {name: weight.detach() for name, weight in model.named_parameters()}
    for weights in run_ranks(ranks, train_without_deepspeed, tmp_path, gas):
        # The gradient's sums are in another order, and ten steps divide by its size: as under engines.
        assert max_difference(weights, expected) < 1e-4
