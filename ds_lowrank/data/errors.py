"""The one error of the data pipeline."""


class DataError(ValueError):
    """The data, or the way they are named, cannot be used; the message says what to change."""
