"""``--stop-on``: what it accepts, when a condition ends a run, and with what a gradient norm is compared."""

from __future__ import annotations

import argparse
import math
from types import SimpleNamespace

import pytest

from ds_lowrank.training.arguments import parse
from ds_lowrank.training.course import DECAY, SETTLED, Course
from ds_lowrank.training.health import BROKEN_STEPS, SCALE_SEARCH_STEPS, Health
from ds_lowrank.training.stop_on import LOSS_STEPS, condition

REQUIRED = ["--deepspeed_config", "x.json", "--model", "m.json", "--steps", "5", "--output", "o"]


def health(*texts, fp16=False, course=None):
    engine = SimpleNamespace(skipped_steps=0, basic_optimizer=None, fp16_enabled=lambda: fp16)
    return Health(engine, 0, lambda: None, [condition(text) for text in texts], course or Course())


def end_of(watched, losses=(), norms=()):
    """The step at which losses or gradient norms end a run, and why; None if they do not."""
    course = watched._limits._course
    for step in range(1, max(len(losses), len(norms)) + 1):
        loss = losses[step - 1] if losses else 1.0
        ratio = course.add_norm(norms[step - 1]) if norms else None
        beyond = watched.is_beyond(SimpleNamespace(grad_norm_ratio=ratio))
        bad = not math.isfinite(loss)
        if (found := watched.note(step, bad, bad, loss, beyond)) is not None:
            return step, found
    return None


@pytest.mark.parametrize(
    ("text", "kind", "limit", "steps"),
    [
        ("nan:3", "nan", None, 3),
        ("loss:6.5", "loss", 6.5, LOSS_STEPS),
        ("loss:1e1:1", "loss", 10.0, 1),
        ("grad-norm:20", "grad-norm", 20.0, 1),
        ("grad-norm:2.5:4", "grad-norm", 2.5, 4),
    ],
)
def test_conditions_are_read(text, kind, limit, steps):
    found = condition(text)
    assert (found.kind, found.steps, str(found)) == (kind, steps, text)
    assert limit is None or found.limit == limit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no condition"),
        ("nan", "is no condition"),
        ("nan:1.5", "is no condition"),
        ("nan:-1", "is no condition"),
        ("nan:0", "the number of steps is not a whole number of at least 1"),
        ("nan:3000000000", "at most 2147483647"),
        ("loss:", "is no condition"),
        ("loss:nan", "is no condition"),
        ("loss:inf", "is no condition"),
        ("loss:1e999", "the limit is not a finite number above 0"),
        ("loss:0", "the limit is not a finite number above 0"),
        ("loss:3:0", "the number of steps is not a whole number of at least 1"),
        ("loss:3:2:1", "is no condition"),
        ("loss: 3", "is no condition"),
        ("grad-norm:1", "the limit is not a finite number above 1"),
        ("accuracy:3", "is no condition"),
    ],
)
def test_anything_else_is_refused(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        condition(text)


def test_the_flag_takes_several_conditions_and_one_of_a_kind(capsys):
    texts = ["nan:3", "loss:8", "grad-norm:30:2"]
    together = parse([*REQUIRED, "--stop-on", *texts])
    apart = parse([*REQUIRED, *(word for text in texts for word in ("--stop-on", text))])
    assert [str(each) for each in together.stop_on] == [str(each) for each in apart.stop_on] == texts
    assert parse(REQUIRED).stop_on is None
    for wrong, message in [
        (["--stop-on", "loss:3", "loss:4"], "loss:3 and loss:4 are two conditions of one kind: give one of them"),
        (["--stop-on", "nan:3", "--stop-on", "nan:4"], "nan:3 and nan:4 are two conditions of one kind"),
        (["--stop-on", "loss=3"], "argument --stop-on: 'loss=3' is no condition: give nan:K"),
    ]:
        with pytest.raises(SystemExit):
            parse([*REQUIRED, *wrong])
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_so_many_steps_without_a_finite_loss_end_a_run():
    nan, losses = math.nan, [1.0, math.nan, math.nan, 1.0]
    assert end_of(health("nan:3"), losses) is None
    assert end_of(health("nan:3"), [*losses, nan, nan, nan, nan]) == (
        7,
        "--stop-on nan:3: the loss has not been finite since step 5",
    )
    assert end_of(health(), [nan] * BROKEN_STEPS)[0] == BROKEN_STEPS
    assert end_of(health("nan:12"), [nan] * 11) is None


@pytest.mark.parametrize("steps", [3, SCALE_SEARCH_STEPS + 20])
def test_fp16_may_search_its_loss_scale(steps):
    watched, most = health(f"nan:{steps}", fp16=True), max(steps, SCALE_SEARCH_STEPS)
    ends = [watched.note(step, False, True, 1.0) for step in range(1, most + 1)]
    assert ends[:-1] == [None] * (most - 1)
    assert ends[-1] == f"--stop-on nan:{steps}: the gradient has not been finite since step 1"


def test_a_loss_above_its_limit_ends_a_run_once_it_has_been_below():
    high, low = [9.0], [5.0]
    assert end_of(health("loss:6:2"), high * 50) is None  # it has not come down yet
    assert end_of(health("loss:10:2"), [11.0, *high, 10.0, 11.0, 11.0]) == (
        5,
        "--stop-on loss:10:2: the loss has been above 10 since step 4, and is 11, after a lowest loss of 9",
    )
    assert end_of(health("loss:6:2"), [*high, *low, *high, *low, *high, *low]) is None
    assert end_of(health("loss:6"), [*low, *high * (LOSS_STEPS - 1), *low]) is None
    assert end_of(health("loss:6"), low + high * LOSS_STEPS)[0] == 1 + LOSS_STEPS
    assert end_of(health("loss:6:3"), [*low, *high, math.nan, *high])[0] == 4
    assert end_of(health("loss:6:2"), [*low, math.inf, math.inf])[0] == 3
    assert end_of(health("loss:6:1"), [*low, 6.0]) is None


def test_nothing_is_saved_while_a_condition_holds():
    watched = health("loss:6:3")
    clean = []
    for step, loss in enumerate([5.0, 7.0, 7.0, 5.0, 7.0], 1):
        assert watched.note(step, False, False, loss) is None
        clean.append(watched.is_clean(step))
    assert clean == [True, False, False, True, False]


def test_the_weights_are_those_of_the_last_good_step_if_all_later_updates_were_skipped():
    def after(*steps, conditions=("nan:2", "loss:6:5")):
        watched = health(*conditions)
        for step, (no_loss, no_gradient, loss) in enumerate(steps, 1):
            watched.note(step, no_loss, no_gradient, loss)
        return watched.keeps_good_weights

    good, skipped, no_loss, high = (False, False, 5.0), (False, True, 5.0), (True, True, math.nan), (False, False, 7.0)
    assert after(good, skipped, no_loss) and after(good, no_loss, no_loss)
    assert not after(good, (True, False, math.nan))  # an update was made all the same
    assert not after(good, high, no_loss)


def test_a_norm_is_compared_with_the_average_of_earlier_steps():
    norms, course = [2.0, 1.0, 4.0, 3.0], Course()
    assert course.add_norm(None) is course.add_norm(math.nan) is course.add_norm(math.inf) is None
    found = [course.add_norm(norm) for norm in norms]
    assert found[0] is None
    for i in range(1, 4):
        weights = [DECAY ** (i - 1 - j) for j in range(i)]
        average = sum(w * n for w, n in zip(weights, norms, strict=False)) / sum(weights)
        assert found[i] == pytest.approx(norms[i] / average, rel=1e-14)


def test_a_course_goes_on_from_its_state_bit_for_bit():
    whole, first, second = Course(), Course(), Course()
    for step in range(20):
        part = first if step < 9 else second
        if step == 9:
            second.load_state_dict(first.state_dict())
        for course in (whole, part):
            course.add_loss(3.0 - step / 7)
        assert whole.add_norm(1 + step / 3) == part.add_norm(1 + step / 3)
    assert whole.state_dict() == second.state_dict()
    fresh = Course()
    fresh.load_state_dict(Course().state_dict())
    assert fresh.lowest_loss == math.inf and fresh.add_norm(1.0) is None


def test_a_norm_far_above_its_average_ends_a_run_once_there_is_one():
    usual = [1.0] * SETTLED
    assert end_of(health("grad-norm:10"), norms=[*usual[1:], 11.0]) is None
    assert end_of(health("grad-norm:10"), norms=[*usual, 9.0]) is None
    assert end_of(health("grad-norm:10"), norms=[*usual, 11.0]) == (
        51,
        "--stop-on grad-norm:10: the gradient norm over its moving average has been above 10 since step 51, and is 11",
    )
    assert end_of(health("grad-norm:10:2"), norms=[*usual, 11.0, 1.0, 11.0]) is None
    assert end_of(health("grad-norm:10:2"), norms=[*usual, 11.0, 90.0])[0] == SETTLED + 2
