"""The errors of the data pipeline."""

from __future__ import annotations


class DataError(ValueError):
    """Data, or a data setting, that cannot be used. The message says what to change."""


class NotTextError(DataError):
    """A file whose bytes are not text in UTF-8, or in the encoding that its byte order mark announces."""
