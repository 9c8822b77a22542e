import math

import pytest
import torch

from ds_lowrank.training.schedule import scheduler_factory, warmup_cosine, warmup_linear, warmup_steps


def test_rises_to_the_peak_at_the_last_warmup_step_and_ends_at_a_tenth():
    factor = warmup_cosine(steps=12, warmup=4)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(7) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)), abs=1e-15)
    assert factor(11) == pytest.approx(0.1, abs=1e-15)
    assert factor(1000) == pytest.approx(0.1, abs=1e-15)


def test_without_warmup_every_step_is_on_the_cosine():
    factor = warmup_cosine(steps=2, warmup=0)
    assert [factor(0), factor(1)] == pytest.approx([0.55, 0.1], abs=1e-15)


def test_the_linear_schedule_peaks_after_warmup_and_ends_at_zero():
    assert [warmup_linear(steps=6, warmup=2)(step) for step in range(8)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [warmup_linear(steps=2, warmup=0)(step) for step in range(2)] == [1.0, 0.5]


def test_warmup_may_take_the_whole_run():
    assert [warmup_cosine(steps=2, warmup=2)(step) for step in range(3)] == pytest.approx([0.5, 1.0, 0.1])


@pytest.mark.parametrize(("warmup", "steps", "expected"), [(0.1, 200, 20), (0, 200, 0), (1, 200, 1), (30, 200, 30)])
def test_warmup_is_a_fraction_below_one_and_a_count_from_one_on(warmup, steps, expected):
    assert warmup_steps(warmup, steps) == expected


@pytest.mark.parametrize("warmup", [-0.1, 1.5, 201])
def test_other_warmups_are_refused(warmup):
    with pytest.raises(ValueError, match="--warmup"):
        warmup_steps(warmup, 200)


def test_each_group_keeps_its_own_base_learning_rate():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.25)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = scheduler_factory(steps=4, warmup=2)(optimizer)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [first for first, _ in seen] == pytest.approx([0.5, 1.0, 0.55, 0.1])
    assert [second for _, second in seen] == pytest.approx([0.125, 0.25, 0.1375, 0.025])
