"""A run whose losses, gradients or weights are not finite is ended; what was good is kept, what is broken is not."""

import math
from types import SimpleNamespace

import pytest
import torch

from ds_lowrank.finetuning import setup
from ds_lowrank.training.health import BROKEN_STEPS, SCALE_SEARCH_STEPS, BrokenRunError, Health
from tests.training.runs import deepspeed_config


def health(fp16=False, step=0, newest=None):
    engine = SimpleNamespace(skipped_steps=0, basic_optimizer=None, fp16_enabled=lambda: fp16)
    return Health(engine, step, lambda: newest)


def broken_at(steps, **more):
    """The step at which a run ends whose steps have these flags: loss and gradient not finite; None if it does not."""
    watched = health(**more)
    for step, (loss, gradient) in enumerate(steps, more.get("step", 0) + 1):
        if watched.note(step, loss, gradient) is not None:
            return step
    return None


FINE, NO_LOSS, SKIPPED = (False, False), (True, True), (False, True)


def test_so_many_broken_steps_in_a_row_end_a_run_and_fewer_do_not():
    few, many = BROKEN_STEPS - 1, BROKEN_STEPS
    for kind in (NO_LOSS, SKIPPED, (True, False)):
        assert broken_at([*[kind] * few, FINE, *[kind] * few, FINE]) is None
        assert broken_at([FINE, FINE, *[kind] * many]) == many + 2
        assert broken_at([kind] * many, step=100) == 100 + many
    assert broken_at([NO_LOSS, SKIPPED] * many) == many  # the weights have not changed since


def test_fp16_may_search_its_loss_scale_but_not_for_ever():
    assert broken_at([SKIPPED] * 33, fp16=True) is None  # 2**32 down to 1
    assert broken_at([SKIPPED] * SCALE_SEARCH_STEPS, fp16=True) == SCALE_SEARCH_STEPS
    assert broken_at([NO_LOSS] * SCALE_SEARCH_STEPS, fp16=True) == BROKEN_STEPS


def test_symptoms_are_the_loss_the_norm_and_skipped_updates():
    watched = health()

    def symptoms(loss=1.0, norm=1.0):
        found = watched.symptoms(SimpleNamespace(loss=torch.tensor(loss), grad_norm=norm))
        return tuple(bool(flag) for flag in found)

    assert symptoms() == symptoms(norm=None) == (False, False)
    assert symptoms(loss=float("inf")) == (True, False) and symptoms(norm=float("nan")) == (False, True)
    watched._engine.skipped_steps += 1
    assert symptoms() == (False, True) and symptoms() == (False, False)


def test_the_message_says_what_to_change_and_what_is_left():
    with pytest.raises(BrokenRunError, match=r"lower the learning rate .* no checkpoint was saved before"):
        health().end(7)
    with pytest.raises(BrokenRunError, match=r"step 7: .*global_step3 is the newest good checkpoint"):
        health(newest="run/checkpoints/global_step3").end(7)
    with (
        pytest.raises(BrokenRunError, match="step 9: the gradient overflows fp16 at the smallest loss scale"),
        health().step(9),
    ):
        raise Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "zero_stage", "precision"),
    [
        ("GaLore", 2, {}),
        ("GaLore", 3, {"bf16": {"enabled": True}}),
        ("AdamW", 0, {}),  # no wrapper of DeepSpeed's skips a step there
        ("AdamW", 1, {}),
    ],
)
def test_a_run_that_breaks_ends_with_an_error_and_keeps_its_good_checkpoint(
    workspace, optimizer, zero_stage, precision
):
    def config(lr):
        schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": lr, "warmup_num_steps": 2}}
        return deepspeed_config(optimizer, zero_stage, **precision, scheduler=schedule)

    name = f"{optimizer}{zero_stage}"
    more = ["--save-interval", "1", "--keep-checkpoints", "1", "--eval-interval", "4"]
    run = workspace.run_forked([*workspace.arguments(name, config=config(1e-3), steps=3), *more], ranks=2)
    assert run.returncode == 0, run.stderr
    arguments = [*workspace.arguments(name, config=config(1e30), steps=40), *more, "--export", "--resume"]
    run = workspace.run_forked(arguments, ranks=2)
    assert run.returncode == 1
    assert run.stderr.startswith("error: step ") and run.stderr.count("\n") == 1, run.stderr
    assert "has not been finite since step" in run.stderr and "lower the learning rate" in run.stderr
    # The first step still has the rate of the checkpoint.
    assert "global_step4 is the newest good checkpoint" in run.stderr
    assert [path.name for path in (workspace.path / name / "checkpoints").glob("global_step*")] == ["global_step4"]
    assert not (workspace.path / name / "export").exists()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["GaLore", "AdamW"])
def test_a_run_that_is_broken_at_its_last_step_is_no_success(workspace, optimizer):
    name = f"short_{optimizer}"
    arguments = workspace.arguments(name, config=deepspeed_config(optimizer, 0), steps=2)
    run = workspace.run_forked([*arguments, "--lr", "1e30", "--warmup", "0", "--save-interval", "1", "--export"])
    assert run.returncode == 1
    assert run.stderr.startswith("error: step 2: the weights, or the loss that they give, are not finite"), run.stderr
    assert "no checkpoint was saved before" in run.stderr
    assert not (workspace.path / name / "export").exists()


def test_a_broken_model_is_never_the_best():
    considered = []
    best = SimpleNamespace(metric="accuracy", consider=lambda step, value: considered.append((step, value)))
    losses = iter([0.5, math.nan])
    task = SimpleNamespace(measure=lambda *_: {"loss": next(losses), "accuracy": 0.75})
    evaluate = setup._evaluator(None, SimpleNamespace(task=task, tokenizer=None), {"": []}, best)
    evaluate(1)
    evaluate(2)
    assert considered == [(1, 0.75)]
