"""LORENZA in the Hugging Face Trainer: whole optimizer steps through :func:`ds_lowrank.forward_backward`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.forward_backward import Forward, forward_backward


class ForwardBackwardMixin:
    """Makes a transformers ``Trainer`` evaluate the loss around the weights, as ``Lorenza`` needs.

    The Trainer runs one forward and backward pass after the other. This collects the micro-batches of an optimizer step
    and runs them all at its end, by :func:`ds_lowrank.forward_backward`; with any other method the steps are the
    Trainer's own. Put it before the class, which may be a subclass such as TRL's ``SFTTrainer``::

        class LorenzaTrainer(ds_lowrank.ForwardBackwardMixin, Trainer):
            pass

    It works under DeepSpeed and without. The logged loss is that of the passes that gave the gradient.
    """

    accelerator: Any
    args: Any
    callback_handler: Any
    optimizer: Any
    state: Any

    def training_step(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Keep a micro-batch or, with the last one of an optimizer step, run all of them.

        Args:
            model: the engine, or without DeepSpeed the model, wrapped or not.
            inputs: the micro-batch.
            num_items_in_batch: the number of labels in all micro-batches of the step, over all ranks.

        Returns:
            The step's loss, a scalar, with its last micro-batch; before that 0. The Trainer adds these up.

        Raises:
            ConfigError: an epoch ends within an optimizer step.
        """
        waiting: list[Forward] = self.__dict__.setdefault("_waiting", [])
        if not waiting:
            self._check_whole_steps()
        prepared = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        waiting.append(partial(self._loss, model, prepared, num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), dtype=torch.float32, device=self.accelerator.device)
        self._waiting: list[Forward] = []
        if len(waiting) < self._steps:
            raise ConfigError(_not_whole(f"its last optimizer step has {len(waiting)}", self._steps))
        model.train()
        engine = getattr(self, "deepspeed", None)
        losses = forward_backward(engine if engine is not None else self.optimizer.optimizer, waiting)
        if engine is not None:
            engine.step()
        return torch.stack(losses).mean()

    @property
    def _steps(self) -> int:
        return int(self.args.gradient_accumulation_steps)

    def _loss(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: torch.Tensor | int | None) -> Any:
        """The loss of a micro-batch, so that the mean over those of a step is the step's loss."""
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            # A copy, because subclasses change the dict, and the loss is computed several times.
            loss = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)  # type: ignore[attr-defined]
        is_scaled = self.loss_is_scaled_for_ga  # type: ignore[attr-defined]
        if is_scaled is None:
            counts = self.model_accepts_loss_kwargs and num_items_in_batch is not None  # type: ignore[attr-defined]
            is_scaled = counts or self.compute_loss_func is not None  # type: ignore[attr-defined]
        return loss * self._steps if is_scaled else loss

    def _check_whole_steps(self) -> None:
        """Refuse at the first step what would otherwise be found at the end of the first epoch."""
        loader = self.callback_handler.train_dataloader
        count = len(loader) if hasattr(loader, "__len__") else 0
        if count % self._steps and self.state.max_steps * self._steps > count:
            raise ConfigError(_not_whole(f"an epoch has {count}", self._steps))


def _not_whole(found: str, steps: int) -> str:
    return (
        f"ForwardBackwardMixin needs whole optimizer steps of {steps} micro-batches on each rank, but {found}: set "
        "gradient_accumulation_steps to a divisor, or change the number of samples"
    )
