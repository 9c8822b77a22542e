"""Options, marks and cuts for the tests of matrices that tensor parallelism splits or replicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_lowrank.methods import METHODS
from ds_lowrank.placement.marks import AUTOTP
from tests.methods import of

CASES = [(method, options) for method in METHODS for options in of(method).grid_options]
"""Every method with two sets of options."""
SPLITS = ("rows", "columns")
COMMON = {"lr": 1e-2, "eps": 0.1}  # as in `harness.relative_error`


@dataclass(frozen=True)
class FakeGrid:
    """The part of a grid that reading the marks on a parameter needs."""

    tensor_rank: int
    tensor_size: int


def megatron_parameter(shape, dim, stride=1):
    """A parameter with megatron-core's marks; ``dim`` is the split dimension, None where it is replicated."""
    parameter = torch.nn.Parameter(torch.empty(*shape))
    parameter.tensor_model_parallel, parameter.partition_stride = dim is not None, stride
    parameter.partition_dim = -1 if dim is None else dim
    return parameter


def autotp_parameter(shape, dim=None, sizes=None, replicated=False, sub_param_sizes=None):
    """A parameter with the marks of DeepSpeed's AutoTP."""
    parameter = torch.nn.Parameter(torch.empty(*shape))
    meta = {
        "partition_dim": dim,
        "partition_sizes": sizes,
        "replicated": replicated,
        "sub_param_sizes": sub_param_sizes,
    }
    setattr(parameter, AUTOTP, meta)
    return parameter


def intervals_of(numels, cuts, order):
    """The interval that each rank stores of the parameter on its tensor-parallel rank."""
    bounds = [[0, *sorted(own), numel] for own, numel in zip(cuts, numels, strict=True)]
    return [tuple(bounds[t][d : d + 2]) for t, d in order]


def cuts_inside_rows(numel, data):
    """Cuts into ``data`` parts of about equal size, one element off, so that they are inside rows."""
    return [numel * d // data + 1 for d in range(1, data)]
