"""Setting up a fine-tuning run from the command line of launch/finetune.py."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from ds_lowrank.adapters.lora import add_lora
from ds_lowrank.adapters.model import has_adapters
from ds_lowrank.checkpoint.manifest import Identity
from ds_lowrank.checkpoint.random_state import seed_everything
from ds_lowrank.collectives import first_on_node, raise_on_all_ranks
from ds_lowrank.data.examples import ExampleStream, HeldOut, held_out_batches
from ds_lowrank.errors import ConfigError
from ds_lowrank.finetuning.best import FOLDER, Best
from ds_lowrank.finetuning.inputs import Inputs, open_inputs
from ds_lowrank.finetuning.model import Source, build_model, find_model
from ds_lowrank.training.config import BatchSizes, read_config
from ds_lowrank.training.flops import closed_form, model_flops
from ds_lowrank.training.output import check_output
from ds_lowrank.training.param_groups import trainable_parameters
from ds_lowrank.training.plan import checkpoint_to_resume, identify, settle_config
from ds_lowrank.training.run import Run, start_engine
from ds_lowrank.training.schedule import scheduler_factory, warmup_steps

logger = logging.getLogger("ds_lowrank")


def set_up(arguments: Namespace) -> Run:
    """Do everything up to the first step. Collective; if one rank fails, all raise.

    Args:
        arguments: the command line of launch/finetune.py.

    Raises:
        ValueError: a setting, file or data set cannot be used (``ConfigError``, ``DataError`` and ``CheckpointError``
            are kinds of it).
        OSError: a file cannot be read.
        RemoteError: another rank failed.
    """
    ranks = dist.get_world_size()
    with raise_on_all_ranks():
        config = read_config(arguments.deepspeed_config)
        batch = settle_config(arguments, config, ranks)
        if config.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
            raise ConfigError("fine-tuning is data-parallel only: remove the tensor_parallel block")
        _check_lora(arguments, config)
        _check_packages()
        replaces = [FOLDER, "export"] if arguments.export else [FOLDER]
        check_output(arguments.output, resuming=arguments.resume is not None, replaces=replaces)
        source = find_model(arguments.model, arguments.task)
        if arguments.lora_rank is not None and source.random:
            raise ValueError("--lora-rank adapts trained weights: give a checkpoint as --model, not a JSON")
    inputs = open_inputs(arguments, source)
    share = {"micro_batch_size": batch.micro, "rank": dist.get_rank(), "world_size": ranks}
    with raise_on_all_ranks():
        stream = ExampleStream(inputs.train, inputs.pad_id, global_batch_size=batch.total, seed=arguments.seed, **share)
        steps = arguments.steps or arguments.epochs * stream.steps_per_epoch
        warmup = warmup_steps(arguments.warmup, steps)
        identity = _identity(arguments, config, batch, ranks, source)
        checkpoint = checkpoint_to_resume(arguments, identity, steps)
    if arguments.eval_interval is None:
        arguments.eval_interval = stream.steps_per_epoch
    model = _build(arguments, source, inputs, config)
    flops = model_flops(model) if dist.get_rank() == 0 else None
    schedule = scheduler_factory(steps, warmup, arguments.schedule)
    engine = start_engine(model, config, schedule, arguments.matrix_lr_scale)
    if flops is not None and has_adapters(engine.module):  # which the engine's optimizer asked for
        flops = closed_form(engine.module)
    if dist.get_rank() == 0:
        logger.info("%s trainable parameters", f"{trainable_parameters(engine.module):,}")
    seed_everything(arguments.seed + dist.get_rank())  # for dropout, which must differ between ranks
    best = Best(engine, inputs.tokenizer, arguments.output, inputs.best_metric)
    validation = {
        prefix: held_out_batches(examples, inputs.pad_id, **share) for prefix, examples in inputs.validation.items()
    }
    run = Run(arguments, engine, steps, identity, stream, inputs.tokenizer)
    run.evaluate = _evaluator(engine, inputs, validation, best)
    run.parts = {"best": best}
    run.flops = flops
    run.facts = lambda: {
        "data": arguments.data,
        "trainable_parameters": trainable_parameters(engine.module),
        "best": best.found,
    }
    run.resume(checkpoint)
    return run


def _check_lora(arguments: Namespace, config: Mapping[str, Any]) -> None:
    if arguments.lora_rank is None:
        return
    if arguments.matrix_lr_scale is not None:
        raise ValueError("--lora-rank leaves the layers' matrices as they are: remove --matrix-lr-scale")
    if config["optimizer"]["params"].get("parametrization") == "adapter":
        raise ValueError("--lora-rank and parametrization 'adapter' are two kinds of adapters: leave one of them out")


def _check_packages() -> None:
    for package, distribution in (("sklearn", "scikit-learn"), ("scipy", "scipy")):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"launch/finetune.py needs {distribution} for its metrics: pip install '.[finetune]'")


def _build(arguments: Namespace, source: Source, inputs: Inputs, config: dict[str, Any]) -> Any:
    """Build the model, the same one on every rank, as new weights are drawn from the seed."""
    seed_everything(arguments.seed)

    def make() -> Any:
        labels = getattr(inputs.task, "labels", None)
        model = build_model(source, arguments.task, labels, inputs.pad_id, arguments.seed, config)
        if arguments.activation_checkpointing:
            model.gradient_checkpointing_enable()
        if arguments.lora_rank is not None:
            model = add_lora(model, arguments.task, arguments.lora_rank, arguments.lora_alpha, arguments.lora_targets)
        return model

    if source.random:  # uses collectives at ZeRO 3; it is the same on every rank, so that none can fail alone
        return make()
    if not os.path.isdir(source.name):
        return first_on_node(make)  # it downloads
    with raise_on_all_ranks():
        return make()


def _evaluator(
    engine: DeepSpeedEngine, inputs: Inputs, validation: Mapping[str, list[HeldOut]], best: Best
) -> Callable[[int], dict[str, float]]:
    """A function that evaluates every validation split and keeps the model if it is the best on the first one."""

    def evaluate(step: int) -> dict[str, float]:
        found = {
            f"eval_{prefix}{name}": value
            for prefix, batches in validation.items()
            for name, value in inputs.task.measure(engine, batches, inputs.tokenizer).items()
        }
        # Of a broken model, predictions and hence an accuracy are still numbers.
        if all(math.isfinite(value) for name, value in found.items() if name.endswith("loss")):
            best.consider(step, found[f"eval_{best.metric}"])
        return found

    return evaluate


def _identity(arguments: Namespace, config: dict[str, Any], batch: BatchSizes, ranks: int, source: Source) -> Identity:
    lora = {}
    if arguments.lora_rank is not None:
        lora = {name: getattr(arguments, name) for name in ("lora_rank", "lora_alpha", "lora_targets")}
    model = source.config.to_diff_dict()
    for key in ("_name_or_path", "transformers_version"):
        model.pop(key, None)
    return identify(
        arguments,
        config,
        batch,
        ranks,
        model={**model, "task": arguments.task, **lora},
        sequence_length=arguments.max_length,
        schedule=arguments.schedule,
    )
