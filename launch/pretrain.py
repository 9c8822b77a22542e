"""Pre-train a LLaMA under DeepSpeed with the optimizer that its configuration names.

deepspeed launch/pretrain.py --deepspeed_config ds_configs/galore_zero2.json \
    --model ds_configs/models/llama_60m.json --steps 10000 --output runs/galore_60m
"""

import os
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed chooses when it is first imported

from deepspeed import DeepSpeedEngine
from deepspeed.runtime.config import DeepSpeedConfigError
from torch.distributed import get_rank, get_world_size

import ds_lowrank
from ds_lowrank.checkpoint.export import export
from ds_lowrank.checkpoint.random_state import get_random_state, seed_everything, set_random_state
from ds_lowrank.checkpoint.store import Progress, load_checkpoint, save_checkpoint
from ds_lowrank.data.batches import BatchStream, ValidationBatch, validation_batches
from ds_lowrank.data.errors import DataError
from ds_lowrank.errors import CheckpointError
from ds_lowrank.models import llama
from ds_lowrank.together import RemoteError, together
from ds_lowrank.training import distributed
from ds_lowrank.training.arguments import parse
from ds_lowrank.training.evaluation import evaluate
from ds_lowrank.training.groups import matrix_groups
from ds_lowrank.training.interrupt import StopRequest
from ds_lowrank.training.loop import train_step
from ds_lowrank.training.metrics import Reporter
from ds_lowrank.training.output import write_results
from ds_lowrank.training.plan import Plan, make_plan
from ds_lowrank.training.record import describe
from ds_lowrank.training.schedule import scheduler_factory
from ds_lowrank.training.text import Text, open_text


@dataclass
class Job:
    arguments: Namespace
    plan: Plan
    text: Text
    engine: DeepSpeedEngine
    stream: BatchStream
    validation: list[ValidationBatch]
    progress: Progress


def set_up(arguments: Namespace) -> Job:
    """Everything up to the first step. Errors are raised on every rank."""
    with together():
        plan = make_plan(arguments, get_world_size())
    text = open_text(
        arguments.data,
        arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        model_vocab=plan.model.vocab_size,
        sequence_length=arguments.sequence_length,
        held_out=arguments.eval_sequences > 0,
        cache=arguments.cache,
    )
    share: dict[str, int] = {"micro_batch_size": plan.batch.micro, "rank": get_rank(), "world_size": get_world_size()}
    stream = BatchStream(text.train, global_batch_size=plan.batch.total, seed=arguments.seed, **share)
    validation = []
    if text.validation is not None:
        validation = validation_batches(text.validation, max_sequences=arguments.eval_sequences, **share)
    seed_everything(arguments.seed)
    job = Job(arguments, plan, text, build_engine(arguments, plan), stream, validation, Progress())
    if plan.checkpoint is not None:
        job.progress, own = load_checkpoint(job.engine, plan.checkpoint)
        stream.load_state_dict(own["data"])
        set_random_state(own["random"])
    return job


def build_engine(arguments: Namespace, plan: Plan) -> DeepSpeedEngine:
    model = llama.build(plan.model, arguments.seed, plan.config)
    if arguments.activation_checkpointing:
        model.gradient_checkpointing_enable()
    parameters = None
    if arguments.matrix_lr_scale is not None:
        parameters = matrix_groups(model, plan.config["optimizer"], arguments.matrix_lr_scale)
    engine, *_ = ds_lowrank.initialize(
        model=model,
        model_parameters=parameters,
        config=plan.config,
        lr_scheduler=None if "scheduler" in plan.config else scheduler_factory(arguments.steps, plan.warmup),
    )
    engine.train()
    return engine


def train(job: Job) -> None:
    """Run to the last step, or to the step at which a rank was asked to stop."""
    arguments, engine, progress = job.arguments, job.engine, job.progress
    stop = StopRequest()
    with Reporter(arguments.output, engine, arguments.steps, progress.step) as report:
        last = replace(progress)
        while progress.step < arguments.steps:
            step = progress.step + 1
            final = step == arguments.steps
            evaluates = bool(job.validation) and (final or due(step, arguments.eval_interval))
            records = final or evaluates or step == 1 or due(step, arguments.log_interval)
            lr = engine.get_lr()[0]
            started = time.perf_counter()
            batches = [{"input_ids": tokens, "labels": tokens} for tokens in job.stream.next_step()]
            result = train_step(engine, batches, measure=records)
            progress.step, progress.tokens = step, progress.tokens + job.plan.tokens_per_step
            progress.seconds += time.perf_counter() - started
            report.advance()
            if records:
                record = describe(engine, result, lr, progress, since=last)
                if evaluates:
                    record["eval_loss"] = evaluate(engine, job.validation)
                report.record(record)
                last = replace(progress)
            stopping = not final and stop.agreed(engine.device)
            if stopping or due(step, arguments.save_interval) or (final and arguments.save_interval):
                checkpoint = save(job)
                report.say(f"saved {checkpoint}")
            if stopping:
                report.say(f"asked to stop at step {step} of {arguments.steps}; --resume continues from here")
                return
    if arguments.export:
        export(engine, job.text.tokenizer, arguments.output / "export")


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def save(job: Job) -> Path:
    own = {"data": job.stream.state_dict(), "random": get_random_state()}
    arguments, plan = job.arguments, job.plan
    return save_checkpoint(job.engine, arguments.save, plan.identity, job.progress, own, arguments.keep_checkpoints)


def main() -> None:
    arguments = parse()
    distributed.join()
    try:
        job = set_up(arguments)
    except (ValueError, OSError, RemoteError, DeepSpeedConfigError) as error:
        distributed.refuse(error)
    try:
        train(job)
    except (CheckpointError, DataError, RemoteError) as error:
        distributed.refuse(error)
    if get_rank() == 0:
        write_results(arguments.output, arguments.steps)
    distributed.leave()


if __name__ == "__main__":
    main()
