"""The package's errors: each says what cannot be honoured and what to change."""


class ConfigError(ValueError):
    """A configuration that cannot be honoured. Raised at start, on every rank."""


class CheckpointError(ValueError):
    """A saved state that does not belong to this optimizer, model or layout."""
