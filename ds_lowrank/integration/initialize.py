"""``ds_lowrank.initialize``: ``deepspeed.initialize`` with this package's methods in ``optimizer.type``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from ds_lowrank.adapters.model import add_adapters, has_adapters
from ds_lowrank.collectives import raise_on_all_ranks
from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.arguments import plain_parameters, settings_of, without_path
from ds_lowrank.integration.check_model import check_model, model_parallel_unit
from ds_lowrank.integration.ds_config.read import without_comments
from ds_lowrank.integration.ds_config.values import autotp_size, section, zero_stage
from ds_lowrank.integration.mpu import as_mpu, check_grid
from ds_lowrank.integration.replaced import check_not_replaced, check_trainer, without_forced_adam
from ds_lowrank.integration.stock import allow_under_zero, stock_initialize
from ds_lowrank.integration.unsupported_settings import check_supported
from ds_lowrank.integration.without_masters import check_storage, convert_model, keeps_masters, without_masters
from ds_lowrank.optimizer.optimizer import LowRankOptimizer
from ds_lowrank.optimizer.options import looks_like_method, method_named, parse_options
from ds_lowrank.optimizer.registry import OPTIMIZERS
from ds_lowrank.placement.averaging import check_mesh
from ds_lowrank.placement.grid import Grid, grid_of
from ds_lowrank.placement.parameter_names import tag_parameters

ADAPTER_PATTERNS = ("target_modules", "exclude_modules", "modules_to_save")
"""Options that choose which modules get adapters, not which parameters the optimizer projects."""


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: str | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | dict[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Build an engine as ``deepspeed.initialize`` does; ``optimizer.type`` may be one of this package's methods.

    Signature and return value are DeepSpeed's. A configuration that names none of the methods, or a client
    ``optimizer`` of another kind, is passed on unchanged; only the gradient norm of fp32 at ZeRO 0 on a grid is
    repaired.

    Args:
        args: with ``deepspeed_config``, if the configuration is a file named on the command line.
        model: the model, built under ``zero.Init`` or not, or a ``PipelineModule``.
        optimizer: a client optimizer; None for the one that the configuration names.
        model_parameters: parameters, named parameters, or groups of either; None for all. A group keeps its own ``lr``,
            ``weight_decay`` and other options.
        training_data: as in DeepSpeed.
        lr_scheduler: as in DeepSpeed.
        distributed_port: as in DeepSpeed.
        mpu: tensor and pipeline parallelism: megatron-core's ``parallel_state`` or any other model-parallel unit; or
            sequence parallelism: DeepSpeed's ``parallel_state_sp``.
        dist_init_required: as in DeepSpeed.
        collate_fn: as in DeepSpeed.
        config: the DeepSpeed configuration, a dict or the path of a JSON file.
        mesh_param: as in DeepSpeed, without a sequence dimension.
        config_params: an older name for ``config``.

    Returns:
        The engine; the optimizer: DeepSpeed's wrapper, or this package's if DeepSpeed does not wrap it; the data
        loader; the scheduler.

    Raises:
        ConfigError: the configuration is invalid or not supported; the message says what to change. Raised on every
            rank, before anything is built.
    """
    from ds_lowrank.integration.clipping import check_norm, repair_clipping
    from ds_lowrank.integration.engine_checkpoints import keep_checkpoints_of_any_grid
    from ds_lowrank.integration.gradient_buffers import repair_gradient_buffers
    from ds_lowrank.integration.projected import share_projections
    from ds_lowrank.integration.stages import check_groups

    settings, source = settings_of(args, config if config is not None else config_params)
    name = section(settings, "optimizer").get("type")
    if optimizer is None and isinstance(name, str) and name not in OPTIMIZERS and (meant := looks_like_method(name)):
        raise ConfigError(f"optimizer.type: {name!r} is not a method; did you mean {meant!r}?")
    low_rank = (optimizer is None and name in OPTIMIZERS) or isinstance(optimizer, LowRankOptimizer)
    mpu = as_mpu(mpu)
    if not low_rank:
        check_not_replaced(() if model is None else model.parameters(), optimizer, name)
    else:
        if optimizer is None:
            check_trainer(str(name))
        settings = _validated(settings, source, optimizer, has_mpu=mpu is not None)
        check_mesh(mesh_param)  # before the model gets adapters
        settings, optimizer = _prepare(model, settings, optimizer, model_parameters, mpu)
    engine, wrapped, loader, scheduler = stock_initialize()(
        args=without_path(args),
        model=model,
        optimizer=optimizer,
        model_parameters=plain_parameters(model_parameters),
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=settings,
        mesh_param=mesh_param,
    )
    if low_rank:
        share_projections(engine)
        engine.basic_optimizer.bind(may_offload=True)
        repair_gradient_buffers(engine)
        check_groups(engine)
        check_norm(engine)
        keep_checkpoints_of_any_grid(engine)
    repair_clipping(engine)
    return engine, wrapped, loader, scheduler


def _validated(
    settings: dict[str, Any], source: str, optimizer: LowRankOptimizer | None, *, has_mpu: bool
) -> dict[str, Any]:
    """The settings without comments, if they are valid and supported, as DeepSpeed has to be given them.

    Args:
        settings: the DeepSpeed configuration.
        source: what messages call it.
        optimizer: the client's; None for the one that the settings name.
        has_mpu: whether the caller passes a model-parallel unit.
    """
    from ds_lowrank.integration.ds_config.validate import validate
    from ds_lowrank.integration.projected import check_projected, without_clipping

    settings = without_comments(settings)
    method = settings["optimizer"]["type"] if optimizer is None else optimizer.method.name
    options = _options_of(settings, optimizer)
    has_masters = keeps_masters(options)
    check_supported(settings, method, has_mpu=has_mpu, has_masters=has_masters)
    validate(settings, source)
    if not has_masters:
        check_storage(settings)
    check_projected(settings, options, method)
    settings = without_clipping(without_forced_adam(settings, method), options)
    return settings if has_masters else without_masters(settings)


def _options_of(settings: Mapping[str, Any], optimizer: LowRankOptimizer | None) -> Mapping[str, Any]:
    """The options of the client's optimizer, or those that the settings name."""
    return section(settings, "optimizer", "params") if optimizer is None else optimizer.defaults


def _prepare(
    model: torch.nn.Module | None,
    settings: dict[str, Any],
    optimizer: LowRankOptimizer | None,
    model_parameters: Iterable[Any] | None,
    mpu: Any,
) -> tuple[dict[str, Any], Any]:
    """Check the model and the configuration, tag the parameters with their names, and convert weights without masters.

    Args:
        model: the caller's.
        settings: the DeepSpeed configuration.
        optimizer: the client's; None for the one that the settings name.
        model_parameters: the caller's.
        mpu: the caller's, as DeepSpeed can use it.

    Returns:
        The settings and the optimizer (or what builds it) for DeepSpeed.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.pipe import PipelineModule

    from ds_lowrank.integration.stages import with_whole_activations

    if model is None:
        raise ConfigError("ds_lowrank.initialize needs a model")
    method = settings["optimizer"]["type"] if optimizer is None else optimizer.method.name
    _check_autotp_ranks(autotp_size(settings))
    if optimizer is None:
        settings = _with_adapters(model, settings, model_parameters)
    in_pipeline = isinstance(model, PipelineModule)
    if in_pipeline:
        get_accelerator().set_device(model.local_rank)  # as DeepSpeed will; collectives need it
    with raise_on_all_ranks() if in_pipeline else nullcontext():  # a problem may exist on one stage only
        check_model(model, mpu, settings, method)
    tag_parameters(model)
    unit = model_parallel_unit(model, mpu)
    grid = None if unit is None else grid_of(unit)
    settings = with_whole_activations(model, settings, grid)
    if not keeps_masters(_options_of(settings, optimizer)) and not zero_stage(settings):
        convert_model(model, settings)
    allow_under_zero()
    if optimizer is None:
        return settings, _factory(model, settings, grid)
    optimizer.set_grid(grid)
    if "scheduler" in settings:
        _keep_lr_ratios(optimizer)
    return settings, optimizer


def _check_autotp_ranks(autotp: int) -> None:
    """Refuse a number of ranks that AutoTP does not divide: DeepSpeed's own error is unclear, and not on every rank."""
    ranks = dist.get_world_size() if dist.is_initialized() else os.environ.get("WORLD_SIZE")
    if autotp > 1 and ranks is not None:
        check_grid(int(ranks), autotp, pipeline=1, megatron=False)


def _factory(
    model: torch.nn.Module, settings: Mapping[str, Any], grid: Grid | None
) -> Callable[[Iterable[Any]], LowRankOptimizer]:
    """A function that builds the optimizer; DeepSpeed calls it with the parameters once it has placed the model."""
    block = settings["optimizer"]
    params = block.get("params", {})
    parse_options(method_named(block["type"]), params)

    def build(parameters: Iterable[Any]) -> LowRankOptimizer:
        tag_parameters(model)  # AutoTP replaces parameters that zero.Init has partitioned
        with raise_on_all_ranks():  # a problem may exist on one stage or shard only
            parameters = list(parameters)
            if not parameters and grid is not None and grid.pipeline is not None:
                raise ConfigError(
                    "a stage of the pipeline has nothing to train: use at most as many stages as there are layers with "
                    "parameters, or choose another partition_method"
                )
            optimizer = OPTIMIZERS[block["type"]](parameters, grid=grid, **params)
        if "scheduler" in settings:
            _keep_lr_ratios(optimizer)
        return optimizer

    return build


def _with_adapters(
    model: torch.nn.Module, settings: dict[str, Any], model_parameters: Iterable[Any] | None
) -> dict[str, Any]:
    """Give the model the adapters that ``optimizer.params`` asks for, unless it has them.

    Returns:
        The settings for the optimizer, without the patterns that chose where adapters go.
    """
    block = settings["optimizer"]
    params = dict(block.get("params", {}))
    adapters = parse_options(method_named(block["type"]), params).adapters
    if adapters is None:
        return settings
    if not has_adapters(model):
        if model_parameters is not None:
            raise ConfigError(
                "parametrization 'adapter' changes the model's parameters, but model_parameters were selected before: "
                "call ds_lowrank.add_adapters(model) before selecting them, or omit model_parameters"
            )
        add_adapters(model, **adapters)
    remaining = {key: value for key, value in params.items() if key not in ADAPTER_PATTERNS}
    return {**settings, "optimizer": {**block, "params": remaining}}


def _keep_lr_ratios(optimizer: LowRankOptimizer) -> None:
    """Keep the ratios of the groups' learning rates: DeepSpeed's schedulers write one rate into every group."""
    lr = optimizer.defaults["lr"]
    for group in optimizer.param_groups:
        if group["lr"] == lr:
            continue
        if lr == 0:
            raise ConfigError("optimizer.params.lr is 0, so a group's own lr cannot be kept under the JSON scheduler")
        group["lr_scale"] *= group["lr"] / lr
        group["lr"] = lr
