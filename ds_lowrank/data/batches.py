"""Training and validation batches whose contents do not depend on the number of ranks.

The k-th global batch is a fixed list of sequences. Rank ``r`` of ``W`` takes rows ``r G/W`` to ``(r+1) G/W`` of its
``G`` rows, in order, ``micro_batch_size`` at a time. Neither the number of ranks nor the micro batch size changes the
data of a step. The labels of a sequence are the sequence itself; Hugging Face models shift them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.global_batch import check_batch_sizes, check_position, rows_of
from ds_lowrank.data.order import EpochOrder
from ds_lowrank.data.packing import PackedBlocks, PackedStream
from ds_lowrank.data.stream import StreamReader

DOCUMENTS_PER_READ = 32


class BatchStream:
    """An endless stream of this rank's micro-batches, one optimizer step at a time.

    Finite data are visited in a new order each epoch, drawn from (seed, epoch); the last ``len(data) % G`` blocks of
    that order are skipped in that epoch, so that no global batch spans two epochs. Streamed data are visited in the
    data set's own order and start again when they end; every rank reads all of them and keeps its own rows.

    Args:
        data: the packed training data.
        global_batch_size: sequences per optimizer step, G, on all ranks together.
        micro_batch_size: sequences per forward pass on one rank.
        rank: this rank's place in data parallelism; ranks that share a model replica pass the same number.
        world_size: the number of data-parallel ranks.
        seed: seed of the order of finite data.

    Raises:
        DataError: the batch sizes do not fit together, or the data are smaller than one global batch (for streamed
            data, this is raised by ``next_step`` when their end is reached).
    """

    def __init__(
        self,
        data: PackedBlocks | PackedStream,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        check_batch_sizes(global_batch_size, micro_batch_size, world_size)
        self._rows = rows_of(rank, world_size, global_batch_size)
        self._micro_batch_size = micro_batch_size
        self._identity: dict[str, int | str] = {
            "fingerprint": data.fingerprint,
            "sequence_length": data.sequence_length,
            "global_batch_size": global_batch_size,
            "seed": seed,
        }
        self._order = (
            _ShuffledBlocks(data, global_batch_size, seed)
            if isinstance(data, PackedBlocks)
            else _StreamOrder(data, global_batch_size)
        )
        self._step = 0

    @property
    def step(self) -> int:
        """The number of steps that have been taken."""
        return self._step

    @property
    def epoch(self) -> int:
        """The number of completed passes over the data."""
        return self._order.epoch(self._step)

    def next_step(self) -> list[torch.Tensor]:
        """This rank's micro-batches of the next optimizer step.

        Returns:
            Token ids, int64 ``[micro_batch_size, sequence_length]`` per micro-batch.

        Raises:
            DataError: streamed data cannot be read, or turned out to be smaller than one global batch.
        """
        rows = self._order.global_batch(self._step, self._rows)
        self._step += 1
        return list(torch.split(rows, self._micro_batch_size))

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, the same on every rank; loadable with ``torch.load(weights_only=True)``."""
        return {**self._identity, "step": self._step, "order": self._order.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. The number of ranks and the micro batch size may differ from those of the saving run.

        Raises:
            DataError: the data, tokenizer, sequence length, global batch size or seed differ.
        """
        check_position(state, self._identity)
        self._order.load_state_dict(state["order"])
        self._step = state["step"]


class Step(NamedTuple):
    """One rank's part of an optimizer step.

    Attributes:
        batches: micro-batches, as keyword arguments of the model.
        tokens: the number of tokens in the step on all ranks together.
    """

    batches: list[dict[str, torch.Tensor]]
    tokens: int


class ValidationBatch(NamedTuple):
    """A batch of validation sequences.

    Attributes:
        tokens: token ids, int64 ``[at most micro_batch_size, sequence_length]``.
        sequences: how many rows count: all of them, or 0 for a batch that only keeps the ranks in step.
    """

    tokens: torch.Tensor
    sequences: int


def validation_batches(
    data: PackedBlocks | PackedStream,
    *,
    max_sequences: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    full: bool = False,
) -> list[ValidationBatch]:
    """This rank's share of a fixed set of validation sequences, without padding and each on exactly one rank.

    The sequences are spread evenly over finite data; of a stream they are the first ones. Rank ``r`` gets every
    ``world_size``-th, starting at ``r``. As a forward pass is a collective under ZeRO 3, all ranks get the same number
    of batches: a rank that has run out repeats its first batch (or the first sequence) with ``sequences`` 0. The mean
    loss over all ranks is ``sum(loss * sequences) / sum(sequences)``.

    Args:
        data: the packed validation data.
        max_sequences: the most sequences on all ranks together.
        micro_batch_size: sequences per forward pass on one rank.
        rank: this rank's place in data parallelism.
        world_size: the number of data-parallel ranks.
        full: whether every batch must be full, as in a pipeline, whose buffers have one size; the number of sequences
            is then rounded down.

    Raises:
        DataError: a size is below 1, the split has less than one sequence, or not enough for ``full`` batches.
    """
    if min(max_sequences, micro_batch_size) < 1:
        raise DataError("max_sequences and micro_batch_size must be 1 or more")
    if full:
        each = micro_batch_size * world_size
        if isinstance(data, PackedBlocks):
            max_sequences = min(max_sequences, len(data))
        if max_sequences < each:
            raise DataError(
                f"a pipeline evaluates full batches, {micro_batch_size} x {world_size} ranks = {each} sequences, and "
                f"{max_sequences} are held out or requested: give more, or a smaller micro batch"
            )
        max_sequences -= max_sequences % each
    chosen = _validation_sequences(data, max_sequences)
    most = -(-len(chosen) // world_size)
    mine = chosen[rank::world_size]
    batches = [ValidationBatch(rows, len(rows)) for rows in torch.split(mine, micro_batch_size) if len(rows)]
    filler = ValidationBatch(batches[0].tokens if batches else chosen[:1], 0)
    return batches + [filler] * (-(-most // micro_batch_size) - len(batches))


class _ShuffledBlocks:
    """The order of finite data, in which the step number alone determines the position."""

    def __init__(self, data: PackedBlocks, global_batch_size: int, seed: int) -> None:
        if len(data) < global_batch_size:
            raise DataError(_too_small(data.name, f"{len(data)} sequences", global_batch_size, data.sequence_length))
        self._data = data
        self._order = EpochOrder(len(data), global_batch_size, seed)

    def epoch(self, step: int) -> int:
        return self._order.epoch(step)

    def global_batch(self, step: int, rows: slice) -> torch.Tensor:
        return self._data.rows(self._order.items(step)[rows])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _StreamOrder:
    """The order of streamed data, with the tokens left over from the last batch. Steps must be taken consecutively."""

    def __init__(self, data: PackedStream, global_batch_size: int) -> None:
        self._data = data
        self._global_batch_size = global_batch_size
        self._reader = StreamReader(data.stream)
        self._epoch = 0
        self._epoch_tokens = 0
        self._rest = np.zeros(0, dtype=np.int64)

    def epoch(self, step: int) -> int:
        return self._epoch

    def global_batch(self, step: int, rows: slice) -> torch.Tensor:
        shape = (self._global_batch_size, self._data.sequence_length)
        size = shape[0] * shape[1]
        parts = [self._rest]
        missing = size - len(self._rest)
        while missing > 0:
            tokens = self._read()
            if not len(tokens):
                self._start_epoch(size)
            parts.append(tokens)
            missing -= len(tokens)
        joined = np.concatenate(parts)
        self._rest = joined[size:].copy()
        return torch.from_numpy(joined[:size].reshape(shape)[rows].copy())

    def state_dict(self) -> dict[str, Any]:
        return {
            "reader": self._reader.state_dict(),
            "epoch": self._epoch,
            "epoch_tokens": self._epoch_tokens,
            "rest": torch.from_numpy(self._rest.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reader = StreamReader(self._data.stream, state["reader"])
        self._epoch = state["epoch"]
        self._epoch_tokens = state["epoch_tokens"]
        self._rest = state["rest"].numpy().copy()

    def _read(self) -> npt.NDArray[np.int64]:
        documents = self._reader.read(DOCUMENTS_PER_READ)
        tokens = self._data.encoded(documents)
        self._epoch_tokens += len(tokens)
        return tokens

    def _start_epoch(self, batch_tokens: int) -> None:
        # With at least batch_tokens tokens per epoch, a batch that spans two epochs contains no token twice.
        if self._epoch_tokens < batch_tokens:
            sizes = (self._global_batch_size, self._data.sequence_length)
            raise DataError(_too_small(self._data.name, f"{self._epoch_tokens} tokens", *sizes))
        self._reader = StreamReader(self._data.stream)
        self._epoch += 1
        self._epoch_tokens = 0


def _validation_sequences(data: PackedBlocks | PackedStream, most: int) -> torch.Tensor:
    """At most ``most`` sequences, int64 ``[count, sequence_length]``, and at least one."""
    if isinstance(data, PackedBlocks):
        count = min(most, len(data))
        chosen = data.rows(np.arange(count, dtype=np.int64) * len(data) // max(count, 1))
    else:
        reader = StreamReader(data.stream)
        tokens = np.zeros(0, dtype=np.int64)
        while len(tokens) < most * data.sequence_length and (documents := reader.read(DOCUMENTS_PER_READ)):
            tokens = np.concatenate([tokens, data.encoded(documents)])
        count = min(most, len(tokens) // data.sequence_length)
        chosen = torch.from_numpy(tokens[: count * data.sequence_length].reshape(count, data.sequence_length))
    if not count:
        raise DataError(_too_small(data.name, "less than one sequence of validation text", 1, data.sequence_length))
    return chosen


def _too_small(name: str, found: str, sequences: int, sequence_length: int) -> str:
    return (
        f"{name!r} holds {found}; one batch needs {sequences} sequences of {sequence_length} tokens: give more data, "
        "or a smaller batch or sequence length"
    )
