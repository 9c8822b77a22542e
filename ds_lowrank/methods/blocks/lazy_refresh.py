"""Q-GaLore's lazy refresh (Zhang et al., arXiv 2407.08296): a basis that hardly changes is found less often.

s <- |Q_old^T Q_new|^2 / |Q_new|^2       the share of the new subspace that was in the old one, from 0 to 1
after queue_size refreshes in a row with s >= cos_threshold:  T <- gamma_proj T    for this matrix
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from ds_lowrank.methods.blocks.projection import safe_ratio
from ds_lowrank.methods.blocks.state_spec import State
from ds_lowrank.methods.blocks.subspace import SubspaceOptions
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program


class LazyRefreshOptions(SubspaceOptions):
    """The keys of a refresh that may come later, in Q-GaLore's spelling."""

    update_proj_gap: int = Field(200, gt=0, strict=True)
    """T, in optimizer steps."""
    cos_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """The similarity of successive bases from which on they are similar. None: every basis lasts T steps."""
    gamma_proj: int = Field(2, gt=1, strict=True)
    """What T is multiplied by."""
    queue_size: int = Field(5, gt=0, strict=True)
    """How many bases in a row must be similar to the one before."""

    @property
    def is_lazy(self) -> bool:
        """Whether refreshes may come later than after T steps."""
        return self.cos_threshold is not None

    @property
    def lazy_state(self) -> dict[str, int]:
        """When the next basis is due, how long the present one lasts, and how many were similar in a row."""
        return {"next_refresh": 0, "interval": self.update_proj_gap, "similar": 0} if self.is_lazy else {}


def note_similarity(
    shard: MatrixShard, state: State, options: LazyRefreshOptions, new: torch.Tensor
) -> Program[torch.Tensor | None]:
    """Decide how long a new basis lasts.

    Args:
        shard: the stack.
        state: with the old basis, none before the first step; its integers become lists, one for each matrix.
        options: with ``cos_threshold``.
        new: ``Q_new``: matrices x owned compressed rows x rank, fp32.

    Returns:
        ``Q_old^T Q_new``: matrices x rank x rank, fp32; None before the first step.
    """
    if state["step"] == 0:
        state["next_refresh"] = options.update_proj_gap
        return None
    axis = shard.replicated_axis(new.shape[2])
    own = yield axis.reduce_scatter(shard.local_contribution(state["basis"].mT @ new))
    squares = torch.stack([own.square().sum((1, 2)), new.square().sum((1, 2))], dim=1).unsqueeze(2)
    rotation, squares = yield axis.all_gather(own), shard.all_reduce(squares)
    similarity = safe_ratio(squares[:, 0], squares[:, 1]).view(-1)
    # All ranks were sent the same bits, and so decide alike. Nothing is similar where a step is only costed.
    shares = [0.0] * len(shard) if similarity.is_meta else similarity.tolist()
    threshold = 1.0 if options.cos_threshold is None else options.cos_threshold
    in_a_row = [state["similar"] + 1 if share >= threshold else 0 for share in shares]
    factors = [options.gamma_proj if count >= options.queue_size else 1 for count in in_a_row]
    state["interval"] = [state["interval"] * factor for factor in factors]
    state["similar"] = [count if factor == 1 else 0 for count, factor in zip(in_a_row, factors, strict=True)]
    state["next_refresh"] = [state["step"] + interval for interval in state["interval"]]
    return shard.or_zeros(rotation, new.shape[2])
