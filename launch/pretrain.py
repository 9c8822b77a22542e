"""Pre-train a LLaMA under DeepSpeed with the optimizer that its configuration names.

deepspeed launch/pretrain.py --deepspeed_config ds_configs/galore_zero2.json \
    --model ds_configs/models/llama_60m.json --steps 10000 --output runs/galore_60m
"""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read by torch's import: a lost rank is reported in one line

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed chooses when it is first imported

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from transformers import LlamaForCausalLM

from ds_lowrank.checkpoint.random_state import seed_everything
from ds_lowrank.collectives import raise_on_all_ranks
from ds_lowrank.data.batches import BatchStream, validation_batches
from ds_lowrank.integration.mpu import make_grid
from ds_lowrank.models import llama
from ds_lowrank.training.arguments import parse
from ds_lowrank.training.evaluation import evaluate
from ds_lowrank.training.flops import model_flops, on_meta
from ds_lowrank.training.plan import Plan, make_plan
from ds_lowrank.training.pretraining_data import TextSteps, open_text
from ds_lowrank.training.run import Run, start_engine
from ds_lowrank.training.schedule import scheduler_factory
from ds_lowrank.training.script import run_script


def set_up(arguments: Namespace) -> Run:
    """Do everything up to the first step. Collective; if one rank fails, all raise."""
    with raise_on_all_ranks():
        plan = make_plan(arguments, dist.get_world_size())
    text = open_text(
        arguments.data,
        plan.tokenizer,
        vocab_size=arguments.vocab_size,
        model_vocab=plan.model.vocab_size,
        sequence_length=arguments.sequence_length,
        held_out=arguments.eval_sequences > 0,
        cache=arguments.cache,
    )
    share: dict[str, int] = {
        "micro_batch_size": plan.batch.micro,
        "rank": plan.grid.data_rank(dist.get_rank()),
        "world_size": plan.grid.data,
    }
    stream = BatchStream(text.train, global_batch_size=plan.batch.total, seed=arguments.seed, **share)
    validation = []
    if text.validation is not None:
        validation = validation_batches(
            text.validation, max_sequences=arguments.eval_sequences, full=plan.grid.pipeline > 1, **share
        )
    seed_everything(arguments.seed)
    engine = build_engine(arguments, plan)
    steps = TextSteps(stream, plan.tokens_per_step)
    run = Run(arguments, engine, arguments.steps, plan.identity, steps, text.tokenizer)
    run.sharers = plan.grid.tensor_ranks * plan.grid.pipeline
    if dist.get_rank() == 0:
        run.flops = model_flops(on_meta(LlamaForCausalLM, plan.model), arguments.sequence_length)
    if validation:
        run.evaluate = lambda _: {"eval_loss": evaluate(engine, validation)}
    run.resume(plan.checkpoint)
    return run


def build_engine(arguments: Namespace, plan: Plan) -> DeepSpeedEngine:
    """Build the model and its engine. Collective."""
    model, mpu = build_model(arguments, plan)
    return start_engine(
        model, plan.config, scheduler_factory(arguments.steps, plan.warmup), arguments.matrix_lr_scale, mpu
    )


def build_model(arguments: Namespace, plan: Plan) -> tuple[Any, Any]:
    """Build the model, and the model-parallel unit if DeepSpeed needs one (else None). Collective."""
    if not plan.grid.uses_megatron:
        model = llama.build(plan.model, arguments.seed, plan.config, weights=plan.weights)
        if arguments.activation_checkpointing:
            model.gradient_checkpointing_enable()
        return model, None
    from ds_lowrank.models import llama_parallel

    tensor, pipeline = plan.grid.tensor, plan.grid.pipeline
    mpu = make_grid(tensor, pipeline, max(arguments.timeout, arguments.setup_timeout))
    model = llama_parallel.build(
        plan.model,
        arguments.seed,
        tensor,
        pipeline,
        sequence_parallel=arguments.sequence_parallel,
        recompute=arguments.activation_checkpointing,
        weights=plan.weights,
    )
    return model, None if pipeline > 1 else mpu


if __name__ == "__main__":
    run_script(parse(), set_up)
