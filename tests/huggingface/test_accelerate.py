"""A loop of accelerate, and TRL's SFTTrainer, take the steps of our own engine."""

from __future__ import annotations

import os

import pytest
import torch

from tests.engines.pool import run_ranks
from tests.engines.scenario import BATCH, METHODS, make_model
from tests.huggingface.scenario import (
    LR,
    STEPS,
    Rows,
    hf_config,
    max_difference,
    own_config,
    train_with_own_engine,
)

pytestmark = pytest.mark.slow


def as_launched(port=29411):
    """The environment of ``accelerate launch`` with a DeepSpeed configuration."""
    import torch.distributed as dist
    from accelerate import PartialState

    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_DEEPSPEED": "true"}
    PartialState(cpu=True)


def accelerate_config(stage, gas, **changes):
    """What accelerate fills in: batch sizes, ``lr`` and ``weight_decay``."""
    config = hf_config(stage, betas=[0.9, 0.999], eps=METHODS["GaLore"]["eps"])
    del config["bf16"]
    return config | {"gradient_clipping": 0.5, "gradient_accumulation_steps": gas} | changes


def train_with_accelerate(stage, gas, client):
    import torch.distributed as dist
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim, DummyScheduler
    from transformers import get_linear_schedule_with_warmup

    import ds_lowrank
    from tests.engines.scenario import full_weights

    ds_lowrank.register()
    as_launched()
    config, ranks = accelerate_config(stage, gas), dist.get_world_size()
    if client:
        params = config.pop("optimizer")["params"]
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = make_model()
    loader = torch.utils.data.DataLoader(Rows(STEPS), batch_size=BATCH // (ranks * gas))
    if client:
        optimizer = ds_lowrank.GaLore(model, **params | {"lr": LR, "weight_decay": 0.0})
        # accelerate steps a client's scheduler once for every rank.
        scheduler = get_linear_schedule_with_warmup(optimizer, 2 * ranks, STEPS * ranks)
    else:
        optimizer = DummyOptim(model.parameters(), lr=LR)
        scheduler = DummyScheduler(
            optimizer, lr_scheduler_callable=lambda built: get_linear_schedule_with_warmup(built, 2, STEPS)
        )
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return full_weights(model)


@pytest.mark.parametrize(
    ("stage", "gas", "client"), [(1, 2, True), (2, 1, False), (2, 2, True), (3, 1, True), (3, 2, False)]
)
def test_ten_steps_of_accelerate_are_those_of_our_own_engine(stage, gas, client):
    """With an optimizer named in the configuration, or built in the program."""
    got = run_ranks(2, train_with_accelerate, stage, gas, client)
    own = run_ranks(2, train_with_own_engine, own_config(stage, 2, gas), gas)
    assert max_difference(got[0], own[0]["weights"]) == 0


def prepare(config, client):
    """The first error, if any, of a program that uses accelerate with this configuration."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim

    import ds_lowrank

    ds_lowrank.register()
    as_launched()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = make_model()
    loader = torch.utils.data.DataLoader(Rows(1), batch_size=4)
    try:
        optimizer = ds_lowrank.GaLore(model, rank=4) if client else DummyOptim(model.parameters(), lr=LR)
        accelerator.prepare(model, optimizer, loader)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_a_swap_for_deepspeeds_cpu_adam_is_refused():
    """Before accelerate compiles and builds it, on every rank; without a word where nothing is swapped."""
    config = accelerate_config(2, 1)
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    assert run_ranks(2, prepare, config, False) == [None, None]
    del config["optimizer"]
    for error in run_ranks(2, prepare, config, True):
        assert "would train with DeepSpeed's CPU Adam in the place of GaLore: set zero_force_ds_cpu_optimizer" in error
    assert run_ranks(2, prepare, config | {"zero_force_ds_cpu_optimizer": False}, True) == [None, None]


def test_accelerate_refuses_an_auto_that_it_cannot_fill_in_and_two_optimizers():
    config = accelerate_config(2, 1)
    config["optimizer"]["params"]["betas"] = "auto"
    for error in run_ranks(2, prepare, config, False):
        assert "specify `optimizer.params.betas` without `auto`" in error
    for error in run_ranks(2, prepare, accelerate_config(2, 1), True):
        assert "You cannot specify an optimizer in the config file and in the code" in error


def train_with_trl(folder, stage, gas):
    import torch.distributed as dist
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    import ds_lowrank
    from tests.engines.scenario import full_weights
    from tests.huggingface.scenario import arguments

    ds_lowrank.register()
    words = {str(number): number for number in range(131)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), pad_token="0", eos_token="1"
    )
    options = {"bf16": False, "gradient_checkpointing": False, "max_length": None}
    own = arguments(folder, stage, dist.get_world_size(), gas, kind=SFTConfig, **options)
    rows = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in Rows(STEPS)])
    trainer = SFTTrainer(model=make_model(), args=own, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return full_weights(trainer.model_wrapped)


@pytest.mark.parametrize(("stage", "gas"), [(1, 1), (2, 2), (3, 1)])
def test_ten_steps_of_trls_sft_trainer_are_those_of_our_own_engine(tmp_path, stage, gas):
    got = run_ranks(2, train_with_trl, tmp_path, stage, gas)
    own = run_ranks(2, train_with_own_engine, own_config(stage, 2, gas), gas)
    # TRL computes the loss by a fused head of its own, in other sums: 2e-7 was measured.
    assert max_difference(got[0], own[0]["weights"]) < 1e-6
