"""Parameters that were frozen when the optimizer was built, and are trained later.

Nothing is kept for a frozen parameter. Where nobody arranged the others, its state is made once it is not frozen any
more. DeepSpeed's partitions are made once and for all: there, its gradient is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from ds_lowrank.collectives import all_gather_object
from ds_lowrank.errors import ConfigError
from ds_lowrank.methods.base import Method
from ds_lowrank.optimizer.build_slots import build_slots
from ds_lowrank.optimizer.param_groups import ParameterGroups
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.zero import read_placement


def with_late(
    method: type[Method],
    groups: ParameterGroups,
    late: Sequence[torch.nn.Parameter],
    state: Mapping[torch.Tensor, Any],
    slots: Mapping[int, list[Slot]],
    grid: Grid,
) -> dict[int, list[Slot]]:
    """The slots of an optimizer, by the ``id`` of their store, with those of parameters that were taken up late.

    Args:
        method: the optimizer's.
        groups: its groups, in which each late parameter is at its place.
        late: the parameters.
        state: the optimizer's: an empty dict for each of them.
        slots: those that there are.
        grid: the optimizer's.
    """
    new = set(late)
    parameters = [one for one in groups.logical_parameters(state) if one.parameter in new]
    own = list(dict.fromkeys(one.parameter for one in parameters))
    made: dict[int, list[Slot]] = {}
    for slot in build_slots(method, parameters, read_placement([own], [{"params": own}]), grid, None):
        made.setdefault(id(slot.fragment.store), []).append(slot)
    both = {**slots, **made}
    return {id(parameter): both[id(parameter)] for trained in groups.parameters for parameter in trained}


def refuse_gradients(groups: ParameterGroups, wrapper: str, ranks: dist.ProcessGroup | None) -> None:
    """Refuse a gradient of a parameter that was left out because it was frozen. Collective once one is not frozen.

    Args:
        groups: the optimizer's.
        wrapper: how DeepSpeed has arranged the other parameters.
        ranks: those that step together: data of one rank alone may reach the parameter. None for this rank alone.

    Raises:
        ConfigError: there is one on any of the ranks; the message has its name.
    """
    late = [parameter for parameter in groups.left_out() if parameter.requires_grad]
    if not late:
        return
    own = [groups.name_of(parameter) for parameter in late if parameter.grad is not None]
    found = own if ranks is None else list(dict.fromkeys(chain.from_iterable(all_gather_object(own, ranks))))
    if found:
        raise ConfigError(
            f"{found[0]} was frozen when the optimizer was set up, and has a gradient now "
            f"({len(found)} such parameters in all), but nothing can be added to {wrapper}: unfreeze before the engine "
            "is built, build a new engine, or keep it frozen"
        )
