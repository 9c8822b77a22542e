"""What the Hugging Face Trainer and accelerate are set up to do in this process; neither is imported for it.

Both may replace an optimizer that they were given by another one, without a word.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from ds_lowrank.errors import ConfigError

logger = logging.getLogger("ds_lowrank")

HOW_TO_NAME_ONE = (
    "name it as optimizer.type in the DeepSpeed configuration, or pass "
    "optimizer_cls_and_kwargs=(lambda: ds_lowrank.{0}, {{...}}) to the Trainer"
)
DROPPED = (
    "%s was built while TrainingArguments have a DeepSpeed configuration: Trainer(optimizers=...) would drop it and "
    "train with AdamW. Instead %s"
)


def calling_trainer() -> Any | None:
    """The transformers ``Trainer`` of which a method is running further up the stack; None if there is none."""
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return None
    kind: type[Any] = module.Trainer
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None


def accelerates_config() -> Mapping[str, Any] | None:
    """The DeepSpeed configuration of the ``Accelerator`` of this process; None if there is no such thing yet."""
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    if state is None or not state._shared_state.get("deepspeed_plugins"):
        return None
    config: Mapping[str, Any] = state().deepspeed_plugin.deepspeed_config
    return config


def transformers_config() -> Mapping[str, Any] | None:
    """The DeepSpeed configuration that transformers has been given, by ``TrainingArguments`` for example, or None."""
    module = sys.modules.get("transformers.integrations.deepspeed")
    config: Mapping[str, Any] | None = None if module is None else module.deepspeed_config()
    return config


def check_optimizer_is_kept(method: str) -> None:
    """Refuse to build an optimizer that accelerate would replace; warn if the Trainer would.

    Args:
        method: the optimizer's.

    Raises:
        ConfigError: accelerate would build DeepSpeed's CPU Adam in its place.
    """
    config = accelerates_config()
    if config is None:
        # A Trainer makes its Accelerator, so who builds an optimizer before that is likely to pass it to a Trainer.
        if "optimizer" not in (transformers_config() or {"optimizer": None}):
            logger.warning(DROPPED, method, HOW_TO_NAME_ONE.format(method))
        return
    if "optimizer" in config:
        return  # DeepSpeed builds that one, and accelerate has none to replace
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ConfigError(
            "zero_optimization.offload_optimizer is set, so accelerate would train with DeepSpeed's CPU Adam in the "
            f"place of {method}: set zero_force_ds_cpu_optimizer to false, or name {method} as optimizer.type there"
        )
