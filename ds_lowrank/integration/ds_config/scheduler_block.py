"""Checks the ``scheduler`` block: does the named scheduler exist, and does it take these parameters?"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from torch.optim import lr_scheduler

from ds_lowrank.errors import closest_name


def scheduler_classes() -> dict[str, Any]:
    """Every ``scheduler.type`` with its class: DeepSpeed's schedulers and torch's."""
    of_torch = {
        name: value
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    of_torch.pop("LRScheduler")
    return of_torch | {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}


def scheduler_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the scheduler of a configuration whose keys and types are right.

    Args:
        config: the DeepSpeed configuration, with a ``scheduler`` block.
    """
    name, params = config["scheduler"]["type"], config["scheduler"]["params"]
    classes = scheduler_classes()
    if name not in classes:
        closest = closest_name(name, classes, cutoff=0.5)
        question = f"; did you mean {closest!r}?" if closest else f". Valid: {', '.join(sorted(classes))}"
        return [f"scheduler.type: {name!r} is no scheduler of DeepSpeed or torch{question}"]
    known = dict(inspect.signature(classes[name].__init__).parameters)
    for own in ("self", "optimizer"):
        known.pop(own)
    found = []
    for key, value in params.items():
        at = f"scheduler.params.{key} ({name})"
        if key not in known:
            closest = closest_name(key, known, cutoff=0.5)
            question = f"; did you mean {closest!r}?" if closest else f". Valid: {', '.join(known)}"
            found.append(f"{at}: unknown key{question}")
        elif value == "auto":
            found.append(f"{at} is 'auto': only the Hugging Face Trainer fills it in, write the value")
        elif (problem := _value_problem(key, value, known[key].default)) is not None:
            found.append(f"{at} {problem}, got {value!r}")
    missing = [key for key, info in known.items() if info.default is info.empty and key not in params]
    found += [f"scheduler.params.{key} ({name}) is missing" for key in missing]
    return found or _trial(name, classes[name], params)


def _value_problem(key: str, value: Any, default: Any) -> str | None:
    """What a parameter must be and is not, or None. Its name and its default tell its type."""
    if key == "warmup_type":
        kinds = (lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE)
        return None if value in kinds else f"must be {' or '.join(map(repr, kinds))}"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "must be true or false"
    if key.endswith(("_num_steps", "_step_size")) and value is not None:
        least = 0 if key == "decay_step_size" else 1
        whole = _is_number(value) and value == int(value) and value >= least
        return None if whole else f"must be a whole number of at least {least}"
    if key.endswith(("_lr", "_ratio", "_rate")) or isinstance(default, int | float):
        values = value if isinstance(value, list) else [value]
        if not all(_is_number(v) or (v is None and default is None) for v in values):
            return "must be a finite number"
        if key.endswith(("_lr", "_ratio")) and any(v is not None and v < 0 for v in values):
            return "must not be negative"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _trial(name: str, scheduler: Any, params: Mapping[str, Any]) -> list[str]:
    """What the scheduler itself says when it is built and stepped."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            built = scheduler(optimizer, **params)
            for _ in range(2):
                optimizer.step()
                built.step()
                rate = float(optimizer.param_groups[0]["lr"])
                if not 0 <= rate < math.inf:
                    return [f"scheduler.params ({name}): they make the learning rate {rate}"]
        except Exception as error:  # whatever a foreign constructor raises is an error of the configuration
            return [f"scheduler.params ({name}): {' '.join(str(error).split())}"]
    return []
