"""Weights as DeepSpeed itself saves them: as one rank would at ZeRO 2, without an optimizer's state.

DeepSpeed's zero_to_fp32.py gives the fp32 weights, and stock engines load them with ``load_module_only=True`` at ZeRO 0
to 2. At ZeRO 3 every rank looks for a file of its own: that is what universal folders are for.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import constants as keys

from ds_lowrank.checkpoint.outgoing import Outgoing, written_aside
from ds_lowrank.checkpoint.saved import Saved
from ds_lowrank.checkpoint.skeleton import Skeleton
from ds_lowrank.checkpoint.spool import spooled

MODEL_STATES = "mp_rank_00_model_states.pt"
MODEL_STATES_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
OPTIM_STATES = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def to_deepspeed(saved: Saved, skeleton: Skeleton | None, out: Path) -> None:
    """Write a folder with ``latest`` and one checkpoint of DeepSpeed's own.

    Args:
        saved: the open checkpoint.
        skeleton: of its model, for further names of tied weights and for stacks; None if it is not known.
        out: the folder to make.

    Raises:
        CheckpointError: the checkpoint is of another model, or there is such a folder.
        OSError: it cannot be written.
    """
    weights = Outgoing(saved, skeleton)
    with written_aside(out) as aside:
        tag = saved.folder.name
        (aside / tag).mkdir()
        flat = spooled(sum(map(math.prod, weights.parameters.values())), torch.float32, aside)
        module: dict[str, torch.Tensor] = OrderedDict()
        first = 0
        for name, shape in weights.parameters.items():
            module[name] = flat[first : first + math.prod(shape)].view(shape)
            weights.read(name, module[name])
            first += math.prod(shape)
        module |= {name: module[known] for name, known in weights.same.items()}
        module |= {name: weights.whole(name) for name in weights.buffers}
        shapes = OrderedDict((name, torch.Size(shape)) for name, shape in weights.parameters.items())
        states = model_states(saved, module, [shapes])
        states |= {keys.BUFFER_NAMES: list(weights.buffers), "shared_params": dict(weights.same)}
        torch.save(states, aside / tag / MODEL_STATES)
        torch.save(optim_states([flat]), aside / tag / OPTIM_STATES)
        (aside / "latest").write_text(tag)
        del flat, module, states


def model_states(saved: Saved, module: Any, param_shapes: list[dict[str, torch.Size]]) -> dict[str, Any]:
    """What an engine reads of a file of model states.

    Args:
        saved: the open checkpoint.
        module: the weights.
        param_shapes: of each parameter group, the shapes of what is in the fp32 weights.
    """
    counters = {"global_steps": saved.manifest.progress.step, "global_samples": 0, "skipped_steps": 0}
    engine = saved.common["engine"]
    return {
        "module": module,
        keys.BUFFER_NAMES: [],
        "optimizer": None,
        keys.PARAM_SHAPES: param_shapes,
        keys.FROZEN_PARAM_SHAPES: {},
        keys.FROZEN_PARAM_FRAGMENTS: {},
        "shared_params": {},
        "lr_scheduler": engine["scheduler"],
        "data_sampler": None,
        "random_ltd": None,
        **counters,
        **{name: value for name, value in engine["counters"].items() if name in counters},
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        keys.DS_VERSION: deepspeed.__version__,
    }


def optim_states(fp32_groups: list[torch.Tensor]) -> dict[str, Any]:
    """A file of optimizer states with nothing but weights.

    Args:
        fp32_groups: the weights of each parameter group, flat.
    """
    content = {
        keys.ZERO_STAGE: 2,
        keys.PARTITION_COUNT: [1],
        keys.SINGLE_PARTITION_OF_FP32_GROUPS: fp32_groups,
        keys.DS_VERSION: deepspeed.__version__,
    }
    return {keys.OPTIMIZER_STATE_DICT: content, keys.DS_VERSION: deepspeed.__version__}
