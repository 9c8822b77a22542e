"""Checkpoints that know no grid, of engines with an optimizer of this package.

    TAG/rank_00000.safetensors   pieces of weights and states, each from one rank, and where they belong
    TAG/common.pt                what all ranks have alike: counters, options, scheduler, loss scale, the caller's state
    TAG/manifest.json            the files, their checksums, how far the run is

Every rank writes what it has, without gathering anything, and reads what it needs, from whichever files have it.
"""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ds_lowrank.checkpoint.common import COMMON, rank_file, read_common, tensor_files
from ds_lowrank.checkpoint.dealt import own_share
from ds_lowrank.checkpoint.folder import advice, complete, merged, on_first_rank, partial_of, prepare, prune
from ds_lowrank.checkpoint.manifest import Manifest, Progress, Sealed
from ds_lowrank.checkpoint.owned import is_owned
from ds_lowrank.checkpoint.reader import SavedTensors
from ds_lowrank.checkpoint.restricted_load import read_data
from ds_lowrank.checkpoint.tensor_file import write_pieces
from ds_lowrank.collectives import all_gather_object, gathered_once, global_rank, raise_on_all_ranks
from ds_lowrank.errors import CheckpointError
from ds_lowrank.integration.engine_state import Schedule, engine_state, load_engine_state
from ds_lowrank.integration.engine_weights import check_shapes, load_weights, weight_names, weight_pieces
from ds_lowrank.optimizer import saved_state
from ds_lowrank.sharding.pieces import Piece

STEP = "step"
"""The text of each rank's file that says after which step it was saved."""
StateParts = Literal["all", "state", "rest", "none"]
"""What is loaded of an optimizer: ``all``; its ``state`` with other options; of it the ``rest``, which AdamW steps; or
``none``."""


@dataclass
class Saving:
    """A checkpoint that is being written.

    Attributes:
        directory: where checkpoints are saved.
        tag: the checkpoint's name.
        run: what identifies the run.
        progress: how far the run is.
        keep: how many checkpoints remain; None for all.
        is_latest: whether ``latest`` is to name it.
    """

    directory: Path
    tag: str
    run: Mapping[str, Any]
    progress: Progress
    keep: int | None
    is_latest: bool
    _thread: threading.Thread | None = None
    _sealed: dict[str, Sealed] = field(default_factory=dict)
    _error: Exception | None = None

    @property
    def path(self) -> Path:
        """The checkpoint's folder, once it is complete."""
        return self.directory / self.tag

    @property
    def is_pending(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def write(self, pieces: Sequence[Piece], metadata: Mapping[str, str], *, in_background: bool) -> None:
        """Write this rank's file.

        Args:
            pieces: what this rank writes; in the background, nobody may change them.
            metadata: further texts of this rank.
            in_background: whether to return at once.
        """
        name = rank_file(global_rank())
        path = partial_of(self.directory, self.tag) / self.tag / name

        def act() -> None:
            try:
                self._sealed[name] = write_pieces(path, pieces, metadata)
            except Exception as error:  # raised where all ranks meet
                self._error = error

        if not in_background:
            act()
            return
        self._thread = threading.Thread(target=act, name="checkpoint", daemon=True)
        self._thread.start()

    def complete(self) -> Path:
        """Wait until all ranks have written, and give the checkpoint its name. Collective.

        Raises:
            CheckpointError: any rank failed; earlier checkpoints are unchanged.
        """
        if self._thread is not None:
            self._thread.join()
        try:
            with raise_on_all_ranks():
                if self._error is not None:
                    raise self._error
            parts = all_gather_object(self._sealed)
            names = [rank_file(rank) for rank in range(len(parts))]
            latest = self.is_latest
            on_first_rank(
                lambda: complete(
                    self.directory, self.tag, self.run, self.progress, merged(parts), names, is_latest=latest
                )
            )
        except (OSError, RuntimeError, CheckpointError) as error:
            self.give_up()
            raise CheckpointError(
                f"{self.path} was not saved: {error}{advice(error)}. Earlier checkpoints are intact"
            ) from error
        if self.keep is not None:
            keep, in_background = self.keep, self._thread is not None
            try:
                on_first_rank(lambda: prune(self.directory, keep, in_background=in_background))
            except (OSError, RuntimeError) as error:
                raise CheckpointError(
                    f"{self.path} was saved, but an older checkpoint was not deleted: {error}"
                ) from error
        return self.path

    def give_up(self) -> None:
        """Delete what was written."""
        partial = partial_of(self.directory, self.tag)
        if global_rank() == 0 and is_owned(partial):
            shutil.rmtree(partial, ignore_errors=True)


def begin_saving(
    engine: Any,
    directory: Path,
    tag: str,
    *,
    run: Mapping[str, Any],
    progress: Progress,
    common: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    keep: int | None = None,
    is_latest: bool = True,
    replaces: bool = False,
    frozen: bool = True,
    snapshots: Snapshots | None = None,
) -> Saving:
    """Write a checkpoint, or begin to write it from a copy in memory. Collective.

    Args:
        engine: with an optimizer of this package.
        directory: where checkpoints are saved; the same folder for all ranks.
        tag: the checkpoint's name.
        run: what identifies the run.
        progress: how far it is.
        common: the caller's state, the same on all ranks: plain values and tensors.
        metadata: texts of this rank.
        keep: how many checkpoints remain; None for all.
        is_latest: whether ``latest`` is to name it.
        replaces: whether an earlier checkpoint of this name is replaced.
        frozen: whether frozen parameters are saved.
        snapshots: memory for copies, from which a thread writes while training goes on; None to write now.

    Returns:
        To be completed.

    Raises:
        CheckpointError: any rank failed; earlier checkpoints are unchanged.
    """
    saving = Saving(directory, tag, run, progress, keep, is_latest)
    try:
        on_first_rank(lambda: prepare(directory, tag, replaces=replaces))
        optimizer = engine.basic_optimizer
        pieces = [*weight_pieces(engine), *optimizer.state_pieces()]
        if not frozen:
            trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
            kept = weight_names(engine, trained)
            pieces = [piece for piece in pieces if "/" in piece.key or piece.key in kept]
        own = own_share(pieces, (optimizer.grid.pipeline_rank, optimizer.grid.tensor_rank))
        states = gathered_once(optimizer.plain_state())
        content = {
            "optimizer": saved_state.merged(states),
            "engine": engine_state(engine),
            "caller": dict(common),
            "progress": {"step": progress.step, "tokens": progress.tokens},
        }
        on_first_rank(lambda: _write_common(partial_of(directory, tag) / tag / COMMON, content))
        with raise_on_all_ranks():
            if snapshots is not None:
                own = snapshots.of(own)
            texts = {**(metadata or {}), STEP: str(progress.step)}
            saving.write(own, texts, in_background=snapshots is not None)
    except (OSError, RuntimeError, CheckpointError) as error:
        saving.give_up()
        raise CheckpointError(
            f"{saving.path} was not saved: {error}{advice(error)}. Earlier checkpoints are intact"
        ) from error
    return saving


def _write_common(path: Path, content: Mapping[str, Any]) -> None:
    """Write what all ranks have alike, if it can be read as data."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    buffer.seek(0)
    read_data(buffer, "meta")
    path.write_bytes(buffer.getbuffer())


class Snapshots:
    """Memory for copies of what a rank writes, used again for every checkpoint: as much as the rank's file.

    Getting memory from the system takes longer than copying into it. On the host it is pinned if there is an
    accelerator.
    """

    def __init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}

    def of(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Copies of some pieces, on the host. They are overwritten by those of the next call.

        Args:
            pieces: of different tensors.
        """
        copies, waits = {}, False
        for piece in pieces:
            flat = piece.data.detach().reshape(-1)
            known = self._copies.get(piece.key)
            if known is None or (known.shape, known.dtype) != (flat.shape, flat.dtype):
                known = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=flat.device.type != "cpu")
            known.copy_(flat, non_blocking=True)
            waits |= flat.device.type != "cpu"
            copies[piece.key] = known
        if waits:
            torch.accelerator.synchronize()
        self._copies = copies
        return [Piece(piece.key, piece.shape, piece.rectangles, copies[piece.key]) for piece in pieces]


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint has for the caller.

    Attributes:
        caller: the caller's state.
        metadata: the texts of each rank that saved.
    """

    caller: dict[str, Any]
    metadata: list[Mapping[str, str]]


def load(
    engine: Any,
    checkpoint: Path,
    manifest: Manifest,
    *,
    parts: StateParts = "all",
    schedule: Schedule = "restore",
    with_counters: bool = True,
    is_strict: bool = True,
) -> Loaded:
    """Load a checkpoint into an engine that was just built, on whatever grid. Collective.

    Args:
        engine: with an optimizer of this package.
        checkpoint: its folder, whose files were checked.
        manifest: its manifest.
        parts: what is loaded of the optimizer's state.
        schedule: what becomes of the scheduler.
        with_counters: whether the engine's counters and loss scale are.
        is_strict: whether it must have all weights; otherwise those that it lacks stay as they are, such as frozen
            ones that were not saved.

    Raises:
        CheckpointError: it does not fit the engine; nothing was changed.
        RemoteError: another rank failed.
    """
    optimizer = engine.basic_optimizer
    names = tensor_files(manifest)
    with raise_on_all_ranks():
        common = read_common(checkpoint)
        source = SavedTensors(checkpoint, names)
    with source:
        with raise_on_all_ranks():
            _check_progress(checkpoint, manifest, common, dict(zip(names, source.metadata, strict=True)))
        own = set().union(*gathered_once(sorted(weight_names(engine))))
        with raise_on_all_ranks():
            check_shapes(engine, source, is_strict=is_strict)
            extra = sorted(key for key in source if "/" not in key and key not in own)
            if extra:
                raise CheckpointError(
                    f"the checkpoint belongs to another model: this one lacks {extra[0]} ({len(extra)} tensors in all)"
                )
            if parts != "none":
                with _read_as_saved(checkpoint):
                    optimizer.load_rows(source, common["optimizer"], parts)
        load_weights(engine, source)
        metadata = source.metadata
    if with_counters:
        with _read_as_saved(checkpoint):
            load_engine_state(engine, common["engine"], schedule)
    return Loaded(common["caller"], metadata)


def _check_progress(
    checkpoint: Path, manifest: Manifest, common: Mapping[str, Any], metadata: Mapping[str, Mapping[str, str]]
) -> None:
    """Check that the files are of one step, whatever the manifest confirms."""
    wanted = {"step": manifest.progress.step, "tokens": manifest.progress.tokens}
    steps = {name: texts.get(STEP, str(wanted["step"])) for name, texts in metadata.items()}
    other = next((name for name, step in steps.items() if step != str(wanted["step"])), None)
    if common["progress"] != wanted or other is not None:
        raise CheckpointError(
            f"{checkpoint} mixes files of several checkpoints: {other or COMMON} is not of step {wanted['step']} and "
            f"{wanted['tokens']} tokens, as the manifest says; resume from another checkpoint"
        )


@contextmanager
def _read_as_saved(checkpoint: Path) -> Iterator[None]:
    """A context in which values of another form than those that are saved are damage, and no error of the program."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{checkpoint} is damaged: {COMMON} does not have what is saved ({type(error).__name__}: {error})"
        ) from error
