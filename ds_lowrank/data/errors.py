"""The error of the data pipeline."""

from __future__ import annotations


class DataError(ValueError):
    """Data, or a data setting, that cannot be used. The message says what to change."""
