"""The arithmetic of benchmarks/memory.py is right: bytes of weights, masters and gradients on real engines."""

from __future__ import annotations

import gc
from collections.abc import Collection

import deepspeed
import pytest
import torch

import ds_lowrank
from benchmarks.memory import bytes_a_parameter
from tests.engines.pool import run_ranks

SIDE, LAYERS = 256, 8
PARAMETERS = LAYERS * SIDE * SIDE


def storages() -> dict[int, int]:
    """Bytes of every tensor's storage that Python knows of, by its address; gradients are known to autograd only."""
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    tensors += [found.grad for found in tensors if found.is_leaf and found.grad is not None]
    return {found.untyped_storage().data_ptr(): found.untyped_storage().nbytes() for found in tensors}


def bytes_since(before: Collection[int]) -> float:
    """Bytes for each parameter of the storages that are not at these addresses."""
    return sum(size for address, size in storages().items() if address not in before) / PARAMETERS


def bytes_of_a_run(zero: int, dtype: str) -> tuple[float, float]:
    """Bytes for each parameter after the first of a step's two micro-batches, and where the optimizer's step begins."""
    before = storages().keys()
    model = torch.nn.Sequential(*(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))
    buffers = {"reduce_bucket_size": SIDE * SIDE, "allgather_bucket_size": SIDE * SIDE}
    of_stage_3 = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "GaLore", "params": {"rank": 1}},
        "zero_optimization": {"stage": zero, **(buffers if zero else {}), **(of_stage_3 if zero == 3 else {})},
        **({"bf16": {"enabled": True}} if dtype == "bfloat16" else {}),
    }
    deepspeed.init_distributed()
    engine, *_ = ds_lowrank.initialize(model=model, config=config)
    before_the_step, in_the_step = [], []
    engine.basic_optimizer.register_step_pre_hook(lambda *_: in_the_step.append(bytes_since(before)))
    for _ in range(8):
        for _ in range(2):
            gc.collect()
            before_the_step.append(bytes_since(before))
            inputs = torch.ones(1, SIDE, dtype=getattr(torch, dtype))
            engine.backward(engine(inputs).float().square().mean())
            engine.step()
    # A thread of gloo that the system has put aside may still hold the buffer of a reduction that is done: the least
    # of seven steps is what is kept.
    return min(before_the_step[3::2]), min(in_the_step[1:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bytes_of_weights_masters_and_gradients(zero, dtype):
    weight = 2 if dtype == "bfloat16" else 4
    each = bytes_a_parameter(zero, weight, ranks=2)
    kept = each["weights"] + each["masters"]
    # On top come the state at rank 1, 12 / SIDE, and two buffers of DeepSpeed or two gathered layers of LAYERS.
    more = 2 * weight / LAYERS + 12 / SIDE + 1e-2
    before_the_step, in_the_step = run_ranks(2, bytes_of_a_run, zero, dtype)[0]
    assert kept + each["gradients"] <= before_the_step <= kept + each["gradients"] + more
    assert kept + each["in the step"] <= in_the_step <= kept + each["in the step"] + more
