"""Unusual models and entry points: frozen, tied and empty parameters, the caller's groups, schedulers, ``register``."""

from __future__ import annotations

import pytest
import torch

from tests.engines.pool import run_ranks
from tests.engines.scenario import Oracle, config, full_weights, make_model, max_relative_difference, train_step

STEPS = 6


def build(kind):
    """The scenario's model, changed."""
    model = make_model(tied=kind == "tied")
    if kind == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "layers.0" not in name
    if kind == "empty":
        model.model.layers[0].register_parameter("nothing", torch.nn.Parameter(torch.zeros(0, 40)))
        model.model.layers[1].register_parameter("none", torch.nn.Parameter(torch.zeros(0)))
    if kind == "unused":
        model.model.layers[1].register_parameter("idle", torch.nn.Parameter(torch.ones(30, 20)))
    return model


def train(kind, settings, steps):
    import deepspeed

    import ds_lowrank

    model = build(kind)
    engine, *_ = ds_lowrank.initialize(model=model, config=settings)
    for step in range(steps):
        train_step(engine, step)
    if settings["zero_optimization"]["stage"] == 3:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


CASES = [(kind, stage) for kind in ("frozen", "tied", "empty", "unused") for stage in range(4)]
CASES.remove(("empty", 3))  # DeepSpeed 0.19.8's stage 3 cannot run the forward of such a model


@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_frozen_tied_empty_and_unused_parameters_step_as_the_oracle(kind, stage):
    oracle = Oracle(model=build(kind))
    for step in range(STEPS):
        oracle.step(step)
    for weights in run_ranks(3, train, kind, config(stage, 3), STEPS):
        assert max_relative_difference(weights, oracle.weights()) < 1e-4


def groups_of(model):
    """Three groups as a caller makes them: matrices, embeddings with their own lr, norms without decay."""
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]},
        {"params": [(n, p) for n, p in named if "embed" in n or "lm_head" in n], "lr": 2.5e-3, "weight_decay": 0.0},
        {"params": [(n, p) for n, p in named if p.ndim == 1], "lr": 5e-3, "weight_decay": 0.0, "name": "norms"},
    ]


def train_groups(settings, steps, schedule, client):
    import ds_lowrank

    model = make_model()
    scheduler = None
    if schedule == "lambda":

        def scheduler(optimizer):
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    built = {"model_parameters": groups_of(model)}
    if client:
        ds_lowrank.tag_parameters(model)
        built = {"optimizer": ds_lowrank.GaLore(groups_of(model), **settings.pop("optimizer")["params"])}
    engine, *_ = ds_lowrank.initialize(model=model, config=settings, lr_scheduler=scheduler, **built)
    groups = engine.basic_optimizer.param_groups
    rates = []
    for step in range(steps):
        rates.append([group["lr"] * group["lr_scale"] for group in groups])
        train_step(engine, step)
    return {"weights": full_weights(engine), "rates": rates, "decays": [group["weight_decay"] for group in groups]}


WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": 0.002, "warmup_max_lr": 0.01, "warmup_num_steps": 4, "warmup_type": "linear"},
}


GROUP_CASES = [(stage, schedule, False) for stage in range(4) for schedule in ("none", "lambda", "json")]


@pytest.mark.parametrize(("stage", "schedule", "client"), [*GROUP_CASES, (0, "json", True), (2, "json", True)])
def test_a_callers_groups_keep_their_lr_and_weight_decay(stage, schedule, client):
    """They also do so under DeepSpeed's scheduler, which writes the same rate into every group."""
    changes = {"scheduler": WARMUP} if schedule == "json" else {}
    settings = config(stage, 2, params={"weight_decay": 0.1}, **changes)
    results = run_ranks(2, train_groups, settings, STEPS, schedule, client)
    rates = results[0]["rates"]
    assert [[rate / step[0] for rate in step] for step in rates] == [pytest.approx([1, 0.25, 0.5])] * STEPS
    assert rates[-1][0] == pytest.approx({"none": 0.01, "lambda": 0.01 / STEPS, "json": 0.01}[schedule])
    oracle = Oracle(weight_decay=0.1)
    group_of = {name: index for index, group in enumerate(groups_of(oracle.model)) for name, _ in group["params"]}
    for name, rule in oracle.rules.items():
        rule.weight_decay = 0.1 if group_of[name] == 0 else 0.0
    for step in range(STEPS):
        for name, gradient in oracle.gradients(step).items():
            oracle.rules[name].step(gradient, rates[step][group_of[name]])
    for result in results:
        assert max_relative_difference(result["weights"], oracle.weights()) < 1e-4
        assert result["decays"] == [0.1, 0.0, 0.0]


def train_registered(settings, steps, stock, tagged):
    import deepspeed

    import ds_lowrank

    initialize = deepspeed.initialize  # as ``from deepspeed import initialize`` at the top of a script
    ds_lowrank.register()
    ds_lowrank.register()
    model = make_model()
    if tagged:
        ds_lowrank.tag_parameters(model)
    initialize = initialize if stock else deepspeed.initialize
    engine, *_ = initialize(model=model, config=settings, model_parameters=model.parameters())
    for step in range(steps):
        train_step(engine, step)
    return full_weights(engine)


@pytest.mark.parametrize(("stage", "stock"), [(0, True), (2, False), (2, True), (3, True)])
def test_deepspeeds_initialize_works_after_register(stage, stock):
    oracle = Oracle()
    for step in range(STEPS):
        oracle.step(step)
    for weights in run_ranks(2, train_registered, config(stage, 2), STEPS, stock, stock):
        assert max_relative_difference(weights, oracle.weights()) < 1e-4


def test_what_was_imported_before_register_needs_tags_and_says_what_to_call():
    with pytest.raises(AssertionError, match=r"rank 0: .*(?s:.)*tag_parameters\(model\) first(?s:.)*rank 1: "):
        run_ranks(2, train_registered, config(2, 2), 1, True, False)


def test_after_register_an_unsupported_configuration_is_refused_on_every_rank():
    with pytest.raises(AssertionError, match=r"rank 0: .*(?s:.)*offload_param is not supported(?s:.)*rank 1: "):
        settings = config(2, 2, zero_optimization={"offload_param": {"device": "cpu"}})
        run_ranks(2, train_registered, settings, 1, False, False)


def train_scenario(settings, steps):
    import ds_lowrank

    model = make_model()
    engine, *_ = ds_lowrank.initialize(model=model, config=settings)
    for step in range(steps):
        train_step(engine, step)
    return full_weights(engine)


def test_target_and_exclude_modules_choose_the_matrices():
    oracle = Oracle(projected=lambda name: "self_attn" in name and "o_proj" not in name)
    for step in range(STEPS):
        oracle.step(step)
    settings = config(1, 2, params={"target_modules": ["*self_attn*"], "exclude_modules": ["o_proj"]})
    for weights in run_ranks(2, train_scenario, settings, STEPS):
        assert max_relative_difference(weights, oracle.weights()) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"proj_type": "reverse_std", "moments": "rotate"},
        {"proj_type": "left", "projector": "svd"},
        {"proj_type": "right", "weight_decay": 0.1, "scale": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_options_of_galore_step_as_the_oracle(stage, options):
    oracle = Oracle(**options)
    for step in range(STEPS):
        oracle.step(step)
    for weights in run_ranks(3, train_scenario, config(stage, 3, params=options), STEPS):
        assert max_relative_difference(weights, oracle.weights()) < 1e-4


def train_one_model_in_two_engines(settings, second, steps):
    """Train a model that another engine has trained, which leaves its marks on the parameters."""
    import ds_lowrank

    model = make_model()
    engine, *_ = ds_lowrank.initialize(model=model, config=settings)
    train_step(engine, 0)
    engine.destroy()
    engine, *_ = ds_lowrank.initialize(model=model, config=second)
    before = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    for step in range(steps):
        train_step(engine, step)
    # Not full_weights: DeepSpeed's reader trusts the marks of the engine that is gone.
    after = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    return {"before": before, "after": after, "metrics": engine.basic_optimizer.metrics()}


@pytest.mark.parametrize(
    ("first", "second"), [((2, "fp32"), (0, "fp32")), ((2, "bf16"), (0, "bf16")), ((1, "fp32"), (2, "fp32"))]
)
def test_a_second_engine_trains_a_model_that_had_another_before(first, second):
    (result,) = run_ranks(
        1, train_one_model_in_two_engines, config(first[0], 1, first[1]), config(second[0], 1, second[1]), 1
    )
    assert result["metrics"]["lowrank/projected_matrices"] == 14
    moved = [(result["after"][n] - result["before"][n]).abs().max().item() for n in result["before"]]
    assert min(moved) > 1e-4
