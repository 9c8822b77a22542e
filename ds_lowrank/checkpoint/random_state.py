"""The random generators of one process: seeding them, and saving and restoring their states."""

from __future__ import annotations

import hashlib
import json
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


def random_state_text() -> str:
    """The states of all generators as JSON."""
    state = get_random_state()
    tensors = {key: value.numpy().tobytes().hex() for key, value in state.items() if isinstance(value, torch.Tensor)}
    return json.dumps({**state, **tensors})


def restore_random_state(text: str) -> None:
    """Restore the states that :func:`random_state_text` returned.

    Args:
        text: the JSON.

    Raises:
        ValueError: it is something else.
    """
    try:
        state = json.loads(text)
        for key in {"torch", "accelerator"} & state.keys():
            state[key] = torch.frombuffer(bytearray.fromhex(state[key]), dtype=torch.uint8).clone()
        set_random_state(state)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"these are no states of random generators: {error}") from error


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed all generators of a rank whose states were not saved, as the run has moved to another grid.

    Args:
        seed: the run's.
        step: after which it goes on.
        rank: this one.
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    seed_everything(int.from_bytes(digest, "little") >> 1)
