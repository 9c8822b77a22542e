"""The random generators of one process: seeding them, and saving and restoring their states."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from deepspeed.accelerator import get_accelerator


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, NumPy, torch and the accelerator."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_random_state() -> dict[str, Any]:
    """The states of all generators, as values that ``torch.load(weights_only=True)`` accepts."""
    generator = dict(numpy.random.get_state(legacy=False))
    generator["state"] |= {"key": generator["state"]["key"].tolist()}
    state = {"python": random.getstate(), "numpy": generator, "torch": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        state["accelerator"] = get_accelerator().get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the states that ``get_random_state`` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    generator = state["numpy"]
    generator["state"]["key"] = numpy.array(generator["state"]["key"], dtype=numpy.uint32)
    numpy.random.set_state(generator)
    torch.set_rng_state(state["torch"])
    if "accelerator" in state:
        get_accelerator().set_rng_state(state["accelerator"])
