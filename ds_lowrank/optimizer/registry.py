"""The optimizer class of every method, by the name it has in ``optimizer.type``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer import lineage, optimizers
from ds_lowrank.optimizer.optimizer import LowRankOptimizer


class Optimizers(Mapping[str, type[LowRankOptimizer]]):
    """The optimizers of all registered methods: those of this package, and those of any method that was imported.

    Each method of this package has its own class in :mod:`ds_lowrank.optimizer.optimizers` or
    :mod:`ds_lowrank.optimizer.lineage`; the class of any other method is made when it is first looked up.
    """

    def __init__(self) -> None:
        self._made: dict[str, type[LowRankOptimizer]] = {}

    def __getitem__(self, name: str) -> type[LowRankOptimizer]:
        """The optimizer class of a method.

        Args:
            name: the method's, as in ``optimizer.type``.

        Raises:
            KeyError: no such method is registered.
        """
        method = METHODS[name]
        written = getattr(optimizers, name, None) or getattr(lineage, name, None)
        if isinstance(written, type) and issubclass(written, LowRankOptimizer) and written.method is method:
            return written
        if name not in self._made or self._made[name].method is not method:
            text = f"{name} on the matrices, AdamW on everything else; see :class:`{method.Options.__qualname__}`."
            members = {"method": method, "__doc__": text, "__module__": "ds_lowrank"}  # where pickle finds it again
            self._made[name] = type(name, (LowRankOptimizer,), members)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        """The names of all registered methods."""
        return iter(METHODS)

    def __len__(self) -> int:
        """How many methods are registered."""
        return len(METHODS)


OPTIMIZERS = Optimizers()
"""Every optimizer class by the name of its method."""
