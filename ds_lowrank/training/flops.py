"""The floating-point operations of a model's training step, counted once at the start.

They are those of the *model*, as model FLOPs utilization (MFU) has them: the products of the forward pass and of the
backward pass, twice as many. A pass that is recomputed (activation checkpointing), a probe (Lorenza) and the optimizer
count as time and not as work. Attention is counted whole, without the saving of a causal mask.

Torch's counter sees the whole model on fake tensors, which have shapes and no values: nothing is computed or allocated,
and it does not matter how DeepSpeed, megatron-core or a pipeline cut the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ds_lowrank.placement.marks import is_partitioned
from ds_lowrank.placement.zero import unpartitioned_shape

COUNTED = "torch's counter"
CLOSED_FORM = "6N + attention"
LENGTHS = (8, 16, 24)
"""Sequence lengths at which a model that gets sequences of any length is counted."""


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of the forward and backward pass of one sequence, ``constant + linear s + quadratic s^2`` for s tokens.

    Attributes:
        constant: independent of the length, such as a head on one token.
        linear: of the products with weights, for each token.
        quadratic: of attention, for each pair of tokens.
        source: how they were found: ``COUNTED`` or ``CLOSED_FORM``.
    """

    constant: float
    linear: float
    quadratic: float
    source: str

    def of(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """FLOPs of some micro-batches, with their padding.

        Args:
            batches: each with ``input_ids``, sequences x tokens.
        """
        total = 0.0
        for batch in batches:
            rows, length = batch["input_ids"].shape
            total += rows * (self.constant + self.linear * length + self.quadratic * length**2)
        return total


def model_flops(model: Any, length: int | None = None) -> ModelFlops:
    """Count the FLOPs of a model, or compute them where they cannot be counted.

    Args:
        model: a model of transformers on any device, also on ``meta``, before it gets an engine. What is frozen needs
            no gradient.
        length: the length of every sequence; None for sequences of different lengths.
    """
    # The counter does not see products with a stack of experts, of which a token uses only some.
    if any(len(unpartitioned_shape(parameter)) > 2 for parameter in model.parameters()):
        return closed_form(model)
    try:
        if any(is_partitioned(parameter) for parameter in model.parameters()):
            model = on_meta(type(model), model.config)
        if length is not None:
            return ModelFlops(count(model, length), 0.0, 0.0, COUNTED)
        return _through([(s, count(model, s)) for s in LENGTHS])
    except Exception:  # a model whose code looks at values, which fake tensors do not have
        return closed_form(model)


def count(model: Any, length: int) -> float:
    """Count the FLOPs of the forward and backward pass of one sequence on fake tensors.

    Args:
        model: as for ``model_flops``.
        length: tokens.
    """
    # The kernels of attention differ by device and not all have a formula in torch's counter; plain products have.
    with _in_evaluation(model), sdpa_kernel(SDPBackend.MATH), FakeTensorMode(allow_non_fake_inputs=True):
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").requires_grad_(tensor.requires_grad)
            for tensors in (model.named_parameters(), model.named_buffers())
            for name, tensor in tensors
        }
        tokens = torch.zeros((1, length), dtype=torch.int64, device="cpu")
        with FlopCounterMode(display=False) as counter:
            functional_call(model, state, (), {"input_ids": tokens}).logits.float().sum().backward()
        return float(counter.get_total_flops())


def closed_form(model: Any) -> ModelFlops:
    """``6 N + 12 L d s`` for each of s tokens: N weights in matrices that are no embeddings, L layers of width d.

    Of a frozen weight there is no gradient, so it counts 4 instead of 6. Of a stack of experts, a token uses some.

    Args:
        model: as for ``model_flops``; it may be partitioned by ZeRO 3.
    """
    config = model.config.get_text_config()
    used = getattr(config, "num_experts_per_tok", None)
    linear, seen = 0.0, set()
    for module in model.modules():
        own = [] if isinstance(module, torch.nn.Embedding) else module.parameters(recurse=False)
        for weight in own:
            shape = unpartitioned_shape(weight)
            if len(shape) < 2 or id(weight) in seen:
                continue
            seen.add(id(weight))
            share = used / shape[0] if len(shape) == 3 and used else 1.0
            linear += share * math.prod(shape) * (6 if weight.requires_grad else 4)
    layers, width = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
    return ModelFlops(0.0, linear, 12.0 * layers * width, CLOSED_FORM)


def on_meta(architecture: Callable[[Any], Any], config: Any) -> Any:
    """A model without weights, for counting what is partitioned or is built from other layers.

    Args:
        architecture: its class.
        config: its configuration.
    """
    with torch.device("meta"):
        return architecture(config)


def _through(points: list[tuple[int, float]]) -> ModelFlops:
    """The parabola through three points at equal distances."""
    (first, low), (second, middle), (_, high) = points
    gap = second - first
    quadratic = (high - 2 * middle + low) / (2 * gap**2)
    linear = (middle - low) / gap - quadratic * (first + second)
    return ModelFlops(low - linear * first - quadratic * first**2, linear, quadratic, COUNTED)


@contextmanager
def _in_evaluation(model: Any) -> Any:
    """Without dropout and recomputation; and without torch's log of what fake tensors cannot do."""
    training, log = model.training, logging.getLogger("torch._subclasses.fake_tensor")
    disabled = log.disabled
    model.eval()
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = disabled
        model.train(training)
