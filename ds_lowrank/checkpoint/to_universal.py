"""Weights as a universal checkpoint of DeepSpeed's: ``zero/NAME/fp32.pt`` for every parameter.

Stock engines load it on any number of ranks at ZeRO 1, 2 and 3 with ``"checkpoint": {"load_universal": true}`` and
``load_checkpoint(OUT, load_optimizer_states=False)``.
"""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
from deepspeed.checkpoint import constants as keys

from ds_lowrank.checkpoint.outgoing import Outgoing, written_aside
from ds_lowrank.checkpoint.saved import Saved
from ds_lowrank.checkpoint.skeleton import Skeleton
from ds_lowrank.checkpoint.to_deepspeed import (
    MODEL_STATES,
    MODEL_STATES_3,
    OPTIM_STATES,
    model_states,
    optim_states,
)

GROUPS = 1024
"""DeepSpeed loads as many parameter groups as the folder has options for. Empty ones leave an engine's own options."""
WITHOUT_WEIGHTS = "without_weights"
"""At ZeRO 3, DeepSpeed 0.19.8 reads what ``latest`` names before a universal folder, and then does not use it."""


def to_universal(saved: Saved, skeleton: Skeleton | None, out: Path) -> None:
    """Write a folder with ``latest_universal`` and one universal checkpoint, one parameter at a time.

    Args:
        saved: the open checkpoint.
        skeleton: of its model, for stacks of experts; None if it is not known.
        out: the folder to make.

    Raises:
        CheckpointError: the checkpoint is of another model, or there is such a folder.
        OSError: it cannot be written.
    """
    weights = Outgoing(saved, skeleton)
    with written_aside(out) as aside:
        tag = saved.folder.name
        for name in weights.parameters:
            folder = aside / tag / "zero" / name
            folder.mkdir(parents=True)
            torch.save({keys.PARAM: weights.whole(name, torch.float32), keys.CAT_DIM: 0}, folder / "fp32.pt")
        common = {keys.PARAM_GROUPS: [{} for _ in range(GROUPS)], keys.DS_VERSION: deepspeed.__version__}
        torch.save(common, aside / tag / "zero" / "optimizer_state.pt")
        states = model_states(saved, {}, [])
        for name in (MODEL_STATES, MODEL_STATES_3):  # ZeRO 3 looks for the second
            torch.save(states, aside / tag / name)
        (aside / "latest_universal").write_text(tag)
        (aside / WITHOUT_WEIGHTS).mkdir()
        torch.save(states, aside / WITHOUT_WEIGHTS / MODEL_STATES_3)
        torch.save(optim_states([]), aside / WITHOUT_WEIGHTS / OPTIM_STATES)
        (aside / "latest").write_text(WITHOUT_WEIGHTS)
