"""Staggered refreshes: every matrix once an interval, spread over it, the same on any layout."""

from collections import Counter
from itertools import pairwise

from ds_lowrank.methods.galore import GaLoreOptions, refresh_due

NAMES = [
    f"model.layers.{i}.{m}.weight"
    for i in range(24)
    for m in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
]


def test_unstaggered_matrices_refresh_together_at_0_T_2T():
    options = GaLoreOptions(update_proj_gap=50)
    assert [step for step in range(150) if refresh_due("w", options, step)] == [0, 50, 100]


def test_staggered_matrices_refresh_at_the_start_and_then_once_an_interval():
    options = GaLoreOptions(update_proj_gap=50, stagger=True)
    for name in NAMES:
        steps = [step for step in range(1, 201) if refresh_due(name, options, step)]
        assert refresh_due(name, options, 0)
        assert [later - earlier for earlier, later in pairwise(steps)] == [50] * 3


def test_no_step_pays_for_more_than_a_tenth_of_them():
    """96 names over 50 steps: 1.9 a step on average. The hash is fixed, so the fullest step is too."""
    options = GaLoreOptions(update_proj_gap=50, stagger=True)
    load = Counter(step for name in NAMES for step in range(1, 51) if refresh_due(name, options, step))
    assert sum(load.values()) == len(NAMES)
    assert max(load.values()) <= len(NAMES) // 10
