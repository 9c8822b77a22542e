"""Adapters under a stock DeepSpeed with AdamW: every stage trains, freezes and exports what one process does."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.engines.pool import run_ranks
from tests.engines.scenario import (
    broadcast_dense_init,
    config,
    full_weights,
    make_model_for,
    max_relative_difference,
    tokens,
    train_step,
)
from tests.rows.row import UNDER_ENGINES

STEPS = 3
ADAMW = {**UNDER_ENGINES, "betas": [0.9, 0.999], "weight_decay": 0.0}
NO_CACHING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""ZeRO 3 releases every gathered parameter at once, small ones too."""


def settings_of(stage, dtype="fp32"):
    settings = config(stage, 2, dtype, zero_optimization=NO_CACHING if stage == 3 else {})
    settings["optimizer"] = {"type": "AdamW", "params": {**ADAMW, "torch_adam": True}}
    return settings


def model_with_adapters(settings=None, zero_init=False, **options):
    """The scenario's model with adapters of rank 3 on all layers except layer 1's MLP."""
    from ds_lowrank.adapters.model import add_adapters

    model = make_model_for(settings, zero_init)
    if zero_init:
        broadcast_dense_init(model, {})
    names = add_adapters(model, adapter_rank=3, exclude_modules=["*.1.mlp.*"], **options)
    assert len(names) == 11
    return model


def train(settings, zero_init, options, steps, folder=None):
    """Train; return the final weights, and the distance between the logits of the export and the engine's."""
    import deepspeed
    from transformers import LlamaForCausalLM

    from ds_lowrank.checkpoint.export import export

    model = model_with_adapters(settings, zero_init, **options)
    engine, *_ = deepspeed.initialize(
        model=model, config=settings, model_parameters=[p for p in model.parameters() if p.requires_grad]
    )
    for step in range(steps):
        train_step(engine, step)
    answer = {"weights": full_weights(engine)}
    if folder is not None:
        engine.eval()
        with torch.no_grad():
            own = engine(input_ids=tokens(0)).logits
        export(engine, None, folder / "export")
        loaded, info = LlamaForCausalLM.from_pretrained(folder / "export", output_loading_info=True)
        with torch.no_grad():
            answer["distance"] = (loaded(input_ids=tokens(0)).logits - own).abs().max().item()
        answer["loading"] = {key: sorted(map(str, value)) for key, value in info.items() if value}
    return answer


@functools.cache
def one_process(norm_axis, detach_norm):
    """The weights of one fp32 process before and after training, and the names of the trained ones."""
    model = model_with_adapters(norm_axis=norm_axis, detach_norm=detach_norm)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
    for step in range(STEPS):
        batch = tokens(step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {name: p.detach() for name, p in model.named_parameters()}
    return before, after, {name for name, p in model.named_parameters() if p.requires_grad}


CASES = [
    *((stage, False, "output", False) for stage in range(4)),
    (3, True, "output", False),
    (3, True, "input", False),
    (3, True, "output", True),
]


@pytest.mark.parametrize(("stage", "zero_init", "norm_axis", "detach_norm"), CASES)
def test_every_stage_trains_and_exports_adapters_as_one_process(stage, zero_init, norm_axis, detach_norm, tmp_path):
    before, after, trainable = one_process(norm_axis, detach_norm)
    assert len(trainable) == 33
    options = {"norm_axis": norm_axis, "detach_norm": detach_norm}
    for answer in run_ranks(2, train, settings_of(stage), zero_init, options, STEPS, tmp_path):
        weights = answer["weights"]
        assert weights.keys() == before.keys()
        for name in weights.keys() - trainable:
            assert torch.equal(weights[name], before[name]), name
        trained = {name: weights[name] for name in trainable}
        assert max_relative_difference(trained, {name: after[name] for name in trainable}) < 1e-5
        assert min((trained[name] - before[name]).norm() for name in trainable) > 1e-3
        assert answer["distance"] < 1e-5
        assert answer["loading"] == {}


def distance_after_resuming(settings, folder):
    """The distance of a run from one resumed from its checkpoint, whose model had other base weights and stepped."""
    import deepspeed

    engines = []
    for scale in (1.0, 1.5):
        model = model_with_adapters()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        trained = [p for p in model.parameters() if p.requires_grad]
        engines.append(deepspeed.initialize(model=model, config=settings, model_parameters=trained)[0])
        train_step(engines[-1], 0)
    first, second = engines
    first.save_checkpoint(folder)
    second.load_checkpoint(folder)
    for engine in engines:
        train_step(engine, 1)
    return max_relative_difference(full_weights(second), full_weights(first))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_restores_frozen_weights_and_their_norms(stage, tmp_path):
    assert run_ranks(2, distance_after_resuming, settings_of(stage), str(tmp_path)) == [0, 0]


@pytest.mark.parametrize(("stage", "zero_init"), [(0, False), (2, False), (3, True)])
def test_bf16_trains_adapters_in_the_direction_of_fp32(stage, zero_init):
    before, after, trainable = one_process("output", False)
    first, second = run_ranks(2, train, settings_of(stage, "bf16"), zero_init, {"norm_axis": "output"}, STEPS)
    for name in trainable:
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        # Adam's first steps are about the signs of gradients, of which bf16 finds the larger ones.
        step, expected = first["weights"][name] - before[name], after[name] - before[name]
        assert torch.nn.functional.cosine_similarity(step.flatten(), expected.flatten(), 0) > 0.8, name
    for name in before.keys() - trainable:
        assert torch.equal(first["weights"][name], before[name].bfloat16().float()), name
