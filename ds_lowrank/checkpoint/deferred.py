"""Deferring one rank's errors inside ``engine.save_checkpoint`` until all ranks have left it.

DeepSpeed ends its save with a barrier. A rank that raises before that, for example because its disk is full, never
reaches the barrier and leaves the other ranks waiting.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine


class DeferredErrors:
    """A context in which the engine's checkpoint writes do not raise. ``raise_first`` then raises the first error.

    Args:
        engine: the engine whose ``save_checkpoint`` is called inside the context.

    Attributes:
        written: the files that this rank has written.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._write = engine.checkpoint_engine.save
        self._errors: list[Exception] = []
        self.written: list[Path] = []

    def __enter__(self) -> DeferredErrors:
        self._engine.checkpoint_engine.save = self._save
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        del self._engine.checkpoint_engine.save  # restores the method of the class
        if not isinstance(error, OSError):
            return False
        # Rank 0 also copies DeepSpeed's scripts after its own files. If that fails, it must still do what the other
        # ranks do at this point.
        self._errors.append(error)
        if hasattr(self._engine.optimizer, "checkpoint_event_epilogue"):
            self._engine.optimizer.checkpoint_event_epilogue()
        dist.barrier()
        return True

    def _save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            self._write(state_dict, path)
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            self._errors.append(error)

    def raise_first(self) -> None:
        """Raise this rank's first error, if there was one.

        Raises:
            Exception: the error of the failed write, as the checkpoint engine raised it.
        """
        if self._errors:
            raise self._errors[0]
