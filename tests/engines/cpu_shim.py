"""Lets megatron-core's GPTModel, unmodified, run forward and backward on a CPU. For tests; never in the package.

megatron-core 0.16.1 asks CUDA for two things on the way, whatever the configuration says:

* on which device it is, for the frequencies of the rotary embedding and for the buffers of collectives;
* for the state of its random numbers, around dropout, also where the rate is 0.

Everything else is avoided by the configuration: weights initialised on the CPU, no fused kernels, an attention mask
that is passed in.
"""

from __future__ import annotations

import torch


def install() -> None:
    """Change this process, which is one rank of one test and ends with it."""
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    torch.cuda.current_device = lambda: torch.device("cpu")
    # The tracker for inference leaves random numbers alone. There is no dropout, so none are drawn.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
