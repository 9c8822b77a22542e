"""The optimizers by the names they have in ``optimizer.type``: one class for every method."""

from __future__ import annotations

from ds_lowrank.methods import METHODS
from ds_lowrank.methods.base import Method
from ds_lowrank.optimizer.optimizer import LowRankOptimizer


def _optimizer(method: type[Method]) -> type[LowRankOptimizer]:
    """The class, which is found, and so can be pickled, as ``ds_lowrank.<name>``."""
    text = (
        f"{method.name} with AdamW for everything that is not projected.\n\n"
        f"``{method.name}(model.named_parameters(), lr=1e-2)``; the options are those of "
        f":class:`{method.Options.__module__}.{method.Options.__name__}`."
    )
    return type(method.name, (LowRankOptimizer,), {"method": method, "__doc__": text, "__module__": "ds_lowrank"})


OPTIMIZERS: dict[str, type[LowRankOptimizer]] = {name: _optimizer(method) for name, method in METHODS.items()}
