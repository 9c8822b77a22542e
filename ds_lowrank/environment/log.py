"""Showing what the package logs in a program that has not set logging up."""

from __future__ import annotations

import logging


class Fallback(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error as long as the program itself has given logging no handler."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record.

        Args:
            record: of the package.
        """
        if not logging.getLogger().handlers:
            super().emit(record)


def show_log() -> None:
    """Show the package's messages, the role table among them. Idempotent; a level that the program set is kept."""
    logger = logging.getLogger("ds_lowrank")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(Fallback())
