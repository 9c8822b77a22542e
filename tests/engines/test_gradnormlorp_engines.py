"""GradNormLoRP's adapters under real engines, requested in the JSON only: compared with a dense process, exported."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.engines.pool import run_ranks
from tests.engines.scenario import Oracle, config, full_weights, make_model, max_relative_difference, tokens, train_step

STEPS = 6  # refreshes at steps 0 and 4
PROJECTION = {"rank": 2, "update_proj_gap": 4, "scale": 0.25}
ADAPTER = {
    "parametrization": "adapter",
    "adapter_rank": 3,
    "exclude_modules": ["*.1.mlp.*"],
    "seed": 5,
    **PROJECTION,
}


def settings_of(stage, dtype="fp32", **params):
    zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return config(stage, 2, dtype, gas=2, method="GradNormLoRP", params=ADAPTER | params, zero_optimization=zero)


def train(settings, folder):
    from transformers import LlamaForCausalLM

    import ds_lowrank
    from ds_lowrank.checkpoint.export import export

    engine, *_ = ds_lowrank.initialize(model=make_model(), config=settings)
    first = None
    for step in range(STEPS):
        train_step(engine, step)
        first = full_weights(engine) if first is None else first
    engine.eval()
    with torch.no_grad():
        own = engine(input_ids=tokens(0)).logits
    export(engine, None, folder / "export")
    loaded = LlamaForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    with torch.no_grad():
        distance = (loaded(input_ids=tokens(0)).logits - own).abs().max().item()
    metrics = engine.basic_optimizer.metrics()
    return {"first": first, "last": full_weights(engine), "distance": distance, "metrics": metrics}


@functools.cache
def oracle():
    import ds_lowrank

    model = make_model()
    ds_lowrank.add_adapters(model, adapter_rank=3, exclude_modules=["*.1.mlp.*"], seed=5)
    dense = Oracle(model=model, projected=lambda name: name.endswith(("lora_A", "lora_B")), **PROJECTION, seed=5)
    dense.step(0)
    first = dense.weights()
    for step in range(1, STEPS):
        dense.step(step)
    return first, dense.weights()


@pytest.mark.parametrize("stage", range(4))
def test_adapters_step_as_the_dense_oracle_and_merge_on_export(stage, tmp_path):
    first, last = oracle()
    for result in run_ranks(2, train, settings_of(stage), tmp_path):
        assert max_relative_difference(result["first"], first) < 1e-5
        assert max_relative_difference(result["last"], last) < 1e-4
        assert result["distance"] < 1e-5
        assert result["metrics"]["lowrank/projected_matrices"] == 22
        assert result["metrics"]["lowrank/adamw_parameters"] == 11


def initialize_error(settings, early_groups):
    import ds_lowrank

    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parameters = list(model.parameters()) if early_groups else None
    try:
        ds_lowrank.initialize(model=model, config=settings, model_parameters=parameters)
    except ds_lowrank.ConfigError as error:
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("params", "early_groups", "message"),
    [
        ({"adapter_rank": 41}, False, "adapter_rank"),
        ({"exclude_modules": ["*"]}, False, "no linear layer"),
        ({"target_modules": ["*typo*"]}, False, "matches no parameter"),
        ({}, True, "omit model_parameters"),
        ({"parametrization": "full"}, False, "adapter_rank belongs to parametrization 'adapter'"),
    ],
)
def test_every_rank_refuses_bad_adapter_options_and_keeps_the_model(params, early_groups, message):
    for text in run_ranks(2, initialize_error, settings_of(2, **params), early_groups):
        assert message in text
