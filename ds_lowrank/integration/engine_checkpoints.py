"""``engine.save_checkpoint`` and ``engine.load_checkpoint`` with checkpoints that know no grid.

The folder, the arguments and what is returned are as in DeepSpeed. Checkpoints that DeepSpeed wrote itself are still
loaded, on the layout that they were saved on.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_lowrank.checkpoint.common import COMMON, rank_file
from ds_lowrank.checkpoint.folder import check_files_together
from ds_lowrank.checkpoint.manifest import Progress
from ds_lowrank.collectives import broadcast_from_rank0, global_rank
from ds_lowrank.errors import CheckpointError
from ds_lowrank.integration.checkpoint import begin_saving, load
from ds_lowrank.integration.saved_layout import check_before_loading

logger = logging.getLogger("ds_lowrank")


def keep_checkpoints_of_any_grid(engine: Any) -> None:
    """Replace the two methods of an engine.

    Args:
        engine: with an optimizer of this package.
    """
    check_before_loading(engine)
    engine.save_checkpoint = _saving(engine, engine.save_checkpoint)
    engine.load_checkpoint = _loading(engine, engine.load_checkpoint)


def is_of_any_grid(folder: Path) -> bool:
    """Whether a folder is a checkpoint that knows no grid, or what is left of one.

    Args:
        folder: of a checkpoint.
    """
    return any(os.path.lexists(folder / name) for name in (COMMON, rank_file(0)))


def _saving(engine: Any, stock: Callable[..., Any]) -> Callable[..., bool]:
    signature = inspect.signature(stock)

    def save_checkpoint(*args: Any, **named: Any) -> bool:
        given = signature.bind(*args, **named)
        given.apply_defaults()
        found = given.arguments
        if not found["save_dir"]:
            raise ValueError(f"save_dir must be a non-empty string, got {found['save_dir']!r}")
        tag = f"global_step{engine.global_steps}" if found["tag"] is None else str(found["tag"])
        begin_saving(
            engine,
            Path(found["save_dir"]),
            tag,
            run={},
            progress=Progress(int(engine.global_steps)),
            common=found["client_state"],
            is_latest=found["save_latest"],
            replaces=True,
            frozen=not found["exclude_frozen_parameters"],
        ).complete()
        return True

    save_checkpoint.__signature__ = signature  # type: ignore[attr-defined]
    save_checkpoint.__doc__ = stock.__doc__
    return save_checkpoint


def _loading(engine: Any, stock: Callable[..., Any]) -> Callable[..., tuple[str | None, dict[str, Any] | None]]:
    signature = inspect.signature(stock)

    def load_checkpoint(*args: Any, **named: Any) -> tuple[str | None, dict[str, Any] | None]:
        given = signature.bind(*args, **named)
        given.apply_defaults()
        found = given.arguments
        folder = broadcast_from_rank0(lambda: _of_any_grid(Path(found["load_dir"]), found["tag"]))
        if folder is None:
            loaded: tuple[str | None, dict[str, Any] | None] = stock(*args, **named)
            return loaded
        if found["custom_load_fn"] is not None:
            raise CheckpointError(f"{folder} is not loaded by a custom_load_fn, which is for DeepSpeed's own files")
        manifest = check_files_together(folder)
        only_module = found["load_module_only"]
        has_states = found["load_optimizer_states"] and not only_module
        content = load(
            engine,
            folder,
            manifest,
            parts="all" if has_states else "none",
            schedule="restore" if found["load_lr_scheduler_states"] else "leave",
            with_counters=not only_module,
            is_strict=found["load_module_strict"],
        )
        if global_rank() == 0:
            logger.info("loaded %s", folder)
        if dist.is_initialized():
            dist.barrier()
        return str(folder), content.caller

    load_checkpoint.__signature__ = signature  # type: ignore[attr-defined]
    load_checkpoint.__doc__ = stock.__doc__
    return load_checkpoint


def _of_any_grid(directory: Path, tag: str | None) -> Path | None:
    """The folder of a checkpoint that knows no grid; None if it is another one, or nothing says which."""
    if tag is None:
        latest = directory / "latest"
        if not latest.is_file():
            return None
        tag = latest.read_text().strip()
    folder = directory / str(tag)
    return folder if is_of_any_grid(folder) else None
