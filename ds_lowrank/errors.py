"""The package's errors: each says what cannot be honoured and what to change."""


class ConfigError(ValueError):
    """A configuration that cannot be honoured. Raised at start, on every rank."""


class CheckpointError(ValueError):
    """A saved state that does not belong to this optimizer, model or layout."""


MISSES_SHARDS = (
    "bf16 with tensor parallelism at ZeRO 0: DeepSpeed 0.19.8 leaves the shards of all tensor-parallel ranks but the "
    "first out of the gradient norm. Set zero_optimization.stage to 1"
)
"""A message of the configuration's check and of the optimizer's, which also sees what the configuration does not say."""
