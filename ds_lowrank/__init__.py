"""Low-rank gradient projection under an unmodified DeepSpeed, the same update on every layout."""

from ds_lowrank.engine import initialize, register
from ds_lowrank.errors import CheckpointError, ConfigError
from ds_lowrank.optimizers import GaLore
from ds_lowrank.roles import tag_parameters

__version__ = "0.1.0"

__all__ = ["CheckpointError", "ConfigError", "GaLore", "initialize", "register", "tag_parameters"]
