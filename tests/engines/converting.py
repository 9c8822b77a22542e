"""Stock engines of DeepSpeed's, and engines of this package, whose checkpoints are converted into each other."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from tests.engines import grids
from tests.engines.scenario import BATCH, METHODS, full_weights

STEPS = 3


def stock_settings(stage: int, dtype: str = "fp32", **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        **more,
    }
    if dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    return settings


def galore_settings(stage: int, **more: Any) -> dict[str, Any]:
    return stock_settings(stage) | {"optimizer": {"type": "GaLore", "params": dict(METHODS["GaLore"])}} | more


def groups_of(model: torch.nn.Module, count: int) -> Any:
    """The trained parameters, or with two groups matrices and vectors apart."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if count == 1:
        return trained
    return [{"params": [p for p in trained if p.ndim == 2]}, {"params": [p for p in trained if p.ndim != 2]}]


def experts_config() -> Any:
    from transformers import MixtralConfig

    sizes = {key: value for key, value in grids.SIZES.items() if key != "num_hidden_layers"}
    return MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2)


def model_of(frozen: bool = False, experts: bool = False, **changes: Any) -> torch.nn.Module:
    if experts:
        from transformers import MixtralForCausalLM

        torch.manual_seed(0)
        return MixtralForCausalLM(experts_config())
    model = grids.dense_model(**changes)
    if frozen:
        model.model.embed_tokens.weight.requires_grad_(False)
    return model


def stock_engine(settings: dict[str, Any], groups: int = 1, **changes: Any) -> Any:
    import deepspeed

    model = model_of(**changes)
    return deepspeed.initialize(model=model, config=settings, model_parameters=groups_of(model, groups))[0]


def train(engine: Any, steps: int = STEPS) -> None:
    for step in range(steps):
        grids.train_step(engine, step)


def stock_run(settings: dict[str, Any], directory: str, groups: int = 1, **changes: Any) -> dict[str, Any]:
    """Train, save, and return weights and moments of every parameter."""
    import torch.distributed as dist

    engine = stock_engine(settings, groups, **changes)

    for step in range(STEPS):
        mine = grids.tokens(step).chunk(dist.get_world_size())[dist.get_rank()]
        engine.backward(engine(input_ids=mine, labels=mine).loss)
        engine.step()
    engine.save_checkpoint(directory)
    return {"weights": full_weights(engine), **moments_of(engine)}


def moments_of(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.zero_optimization_stage() in (1, 2):  # DeepSpeed links the states when only the first group has any
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, dict[str, torch.Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for key, values in found.items():
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if engine.zero_optimization_stage() == 0:
                inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
                states = dict(zip(engine.module.parameters(), inner.state.values(), strict=True))
                value = states[parameter][key]
            else:
                value = safe_get_full_optimizer_state(parameter, key)
            values[name] = value.detach().float().clone()
    return found


def low_rank_run(
    settings: dict[str, Any], directory: str, tag: str | None = None, **changes: Any
) -> dict[str, torch.Tensor]:
    """Train with a method of this package, save, and return the weights."""
    import ds_lowrank

    engine = ds_lowrank.initialize(model=model_of(**changes), config=settings)[0]
    train(engine)
    engine.save_checkpoint(directory, tag=tag)
    return full_weights(engine)


def identified_run(settings: dict[str, Any], directory: str, **changes: Any) -> dict[str, torch.Tensor]:
    """Train and save as launch/pretrain.py does: the checkpoint says which model it is of."""
    import ds_lowrank
    from ds_lowrank.checkpoint.manifest import Progress
    from ds_lowrank.integration.checkpoint import begin_saving

    model = model_of(**changes)
    run = {"model": model.config.to_diff_dict()}
    engine = ds_lowrank.initialize(model=model, config=settings)[0]
    train(engine)
    path = Path(directory)
    begin_saving(engine, path, "global_step3", run=run, progress=Progress(3), common={}).complete()
    return full_weights(engine)


def low_rank_start(settings: dict[str, Any], directory: str, again: str, **changes: Any) -> dict[str, torch.Tensor]:
    """Load weights as a user does, then the moments of the rest as well, and save what there is then."""
    import ds_lowrank
    from ds_lowrank.checkpoint.folder import check_files_together
    from ds_lowrank.integration.checkpoint import load

    torch.manual_seed(5)
    model = model_of(**changes)
    for parameter in model.parameters():
        parameter.data.normal_()
    engine = ds_lowrank.initialize(model=model, config=settings)[0]
    engine.load_checkpoint(directory, load_optimizer_states=False)
    weights = full_weights(engine)
    folder = Path(directory) / "global_step0"
    load(engine, folder, check_files_together(folder), parts="rest", with_counters=False)
    engine.save_checkpoint(again)
    train(engine, 1)
    return weights


def stock_load(settings: dict[str, Any], directory: str, groups: int = 1, **arguments: Any) -> dict[str, torch.Tensor]:
    """Load into a stock engine whose weights were others."""
    import deepspeed

    changes = arguments.pop("changes", {})
    engine = stock_engine(settings, groups, **changes)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.fill_(7.0)
    path, _ = engine.load_checkpoint(directory, **arguments)
    assert path is not None
    return full_weights(engine)


def tensor_parallel_run(settings: dict[str, Any], directory: str) -> None:
    """Take steps that do not move the weights, under DeepSpeed's AutoTP on two ranks, and save."""
    import deepspeed

    model = grids.dense_model()
    settings = {**settings, "tensor_parallel": {"autotp_size": 2}}
    settings["optimizer"] = {"type": "AdamW", "params": {"lr": 0.0, "weight_decay": 0.0, "torch_adam": True}}
    settings["train_micro_batch_size_per_gpu"] = settings.pop("train_batch_size")
    engine = deepspeed.initialize(model=model, config=settings, model_parameters=model.parameters())[0]
    batch = grids.tokens(0)
    engine.backward(engine(input_ids=batch, labels=batch).loss)
    engine.step()
    engine.save_checkpoint(directory)


def to_universal_by_deepspeed(directory: str, out: str) -> None:
    from deepspeed.checkpoint import ds_to_universal

    tag = (Path(directory) / "latest").read_text()
    ds_to_universal.main(
        Namespace(
            input_folder=f"{directory}/{tag}",
            output_folder=out,
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
