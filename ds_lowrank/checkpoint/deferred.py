"""Errors of one rank inside `engine.save_checkpoint`, put off until all ranks have left it.

DeepSpeed ends its save with a barrier. A rank that raises on the way, because its disk is full, never gets there and
leaves the others waiting.
"""

from types import TracebackType
from typing import Any

from deepspeed import DeepSpeedEngine
from torch import distributed


class DeferredErrors:
    """Within the context, writing a file never raises; `raise_first` raises what happened first, if anything did."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._write = engine.checkpoint_engine.save
        self._errors: list[Exception] = []

    def __enter__(self) -> "DeferredErrors":
        self._engine.checkpoint_engine.save = self._save
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        del self._engine.checkpoint_engine.save  # uncovers the class's own
        if not isinstance(error, OSError):
            return False
        # Rank 0 also copies DeepSpeed's scripts, after its own files: what the others do then is this.
        self._errors.append(error)
        if hasattr(self._engine.optimizer, "checkpoint_event_epilogue"):
            self._engine.optimizer.checkpoint_event_epilogue()
        distributed.barrier()
        return True

    def _save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            self._write(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
            self._errors.append(error)

    def raise_first(self) -> None:
        if self._errors:
            raise self._errors[0]
