"""Encoded examples, in batches whose contents do not depend on the number of ranks.

The k-th global batch is a fixed list of examples. Rank ``r`` of ``W`` takes examples ``r G/W`` to ``(r+1) G/W`` of its
``G``, in order, ``micro_batch_size`` at a time. Each micro-batch is padded on the right to its own longest example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ds_lowrank.data.batches import Step
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.global_batch import check_batch_sizes, check_position, rows_of
from ds_lowrank.data.order import EpochOrder

UNLABELLED = -100  # Hugging Face's losses ignore tokens with this label


class Example(NamedTuple):
    """One encoded example.

    Attributes:
        input_ids: token ids, int32 ``[length]``.
        labels: a class, a number to predict, or one label per token, int32 ``[length]``.
        token_types: which text of a pair a token belongs to, int32 ``[length]``; None for models without token types.
        answer: the text that a generated answer is compared with, which ``labels`` may have lost the end of.
    """

    input_ids: npt.NDArray[np.int32]
    labels: int | float | npt.NDArray[np.int32]
    token_types: npt.NDArray[np.int32] | None = None
    answer: str = ""

    @property
    def targets(self) -> int:
        """The number of predictions that count: 1 for a class or a number, else the labelled tokens after the first."""
        return int((self.labels[1:] != UNLABELLED).sum()) if isinstance(self.labels, np.ndarray) else 1


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad examples to a batch of keyword arguments for a Hugging Face model.

    Args:
        examples: at least one, all of the same kind.
        pad_id: the id that pads ``input_ids``.

    Returns:
        ``input_ids``, ``attention_mask`` and, if the examples have them, ``token_type_ids``: int64
        ``[examples, longest]``. ``labels``: of the same shape for token labels, else ``[examples]``.
    """
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: Sequence[npt.NDArray[np.int32]], value: int) -> torch.Tensor:
        filled = np.full((len(rows), longest), value, dtype=np.int64)
        for place, row in zip(filled, rows, strict=True):
            place[: len(row)] = row
        return torch.from_numpy(filled)

    batch = {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "attention_mask": padded([np.ones_like(example.input_ids) for example in examples], 0),
    }
    if examples[0].token_types is not None:
        batch["token_type_ids"] = padded([e.token_types for e in examples if e.token_types is not None], 0)
    if isinstance(examples[0].labels, np.ndarray):
        batch["labels"] = padded([e.labels for e in examples if isinstance(e.labels, np.ndarray)], UNLABELLED)
    else:
        labels = [example.labels for example in examples]
        dtype = torch.float32 if any(isinstance(label, float) for label in labels) else torch.int64
        batch["labels"] = torch.tensor(labels, dtype=dtype, device="cpu")
    return batch


def fingerprint(examples: Sequence[Example]) -> str:
    """Hash of the tokens and labels of all examples."""
    digest = hashlib.sha256()
    for example in examples:
        labels = example.labels.tobytes() if isinstance(example.labels, np.ndarray) else repr(example.labels).encode()
        digest.update(b"%d %d " % (len(example.input_ids), len(labels)) + example.input_ids.tobytes() + labels)
    return digest.hexdigest()


class ExampleStream:
    """An endless stream of optimizer steps over finite examples, in a new order each epoch.

    The last ``len(examples) % global_batch_size`` examples of an epoch's order are skipped in that epoch.

    Args:
        examples: the training examples.
        pad_id: the id that pads short examples.
        global_batch_size: examples per optimizer step on all ranks together.
        micro_batch_size: examples per forward pass on one rank.
        rank: this rank's place in data parallelism.
        world_size: the number of data-parallel ranks.
        seed: seed of the order.

    Raises:
        DataError: the batch sizes do not fit together, or there are fewer examples than one global batch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        pad_id: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        check_batch_sizes(global_batch_size, micro_batch_size, world_size)
        if len(examples) < global_batch_size:
            raise DataError(
                f"{len(examples)} training examples are fewer than one batch of {global_batch_size}: give more data, "
                "or a smaller --global-batch-size"
            )
        self._examples = examples
        self._pad_id = pad_id
        self._rows = rows_of(rank, world_size, global_batch_size)
        self._micro_batch_size = micro_batch_size
        self._micro_batches = global_batch_size // micro_batch_size
        self._order = EpochOrder(len(examples), global_batch_size, seed)
        self._identity: dict[str, int | str] = {
            "fingerprint": fingerprint(examples),
            "global_batch_size": global_batch_size,
            "seed": seed,
        }
        self._step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per pass over the examples."""
        return self._order.steps_per_epoch

    def next_step(self) -> Step:
        """This rank's micro-batches of the next optimizer step. Padding is not counted among its tokens."""
        chosen = [self._examples[item] for item in self._order.items(self._step)]
        self._step += 1
        own = chosen[self._rows]
        parts = [own[i : i + self._micro_batch_size] for i in range(0, len(own), self._micro_batch_size)]
        batches = [collate(part, self._pad_id) for part in parts]
        if isinstance(chosen[0].labels, np.ndarray):
            # The model divides each sum by this number; the mean over micro-batches and ranks then weighs all targets
            # of the step equally.
            share = sum(example.targets for example in chosen) / self._micro_batches
            targets = torch.tensor(share, dtype=torch.float32, device="cpu")
            batches = [{**batch, "num_items_in_batch": targets} for batch in batches]
        return Step(batches, sum(len(example.input_ids) for example in chosen))

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, the same on every rank; loadable with ``torch.load(weights_only=True)``."""
        return {**self._identity, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            DataError: the data, tokenizer, global batch size or seed differ.
        """
        check_position(state, self._identity)
        self._step = state["step"]


class HeldOut(NamedTuple):
    """A batch of held-out examples.

    Attributes:
        batch: keyword arguments of the model.
        examples: the examples in the batch; empty for a batch that only keeps the ranks in step and does not count.
    """

    batch: dict[str, torch.Tensor]
    examples: Sequence[Example]


def held_out_batches(
    examples: Sequence[Example], pad_id: int, *, micro_batch_size: int, rank: int, world_size: int
) -> list[HeldOut]:
    """This rank's share of the held-out examples: every ``world_size``-th, starting at ``rank``.

    As a forward pass is a collective under ZeRO 3, all ranks get the same number of batches: a rank that has run out
    repeats the first example in batches that do not count.

    Args:
        examples: all held-out examples, at least one.
        pad_id: the id that pads short examples.
        micro_batch_size: examples per forward pass on one rank.
        rank: this rank's place in data parallelism.
        world_size: the number of data-parallel ranks.
    """
    own = examples[rank::world_size]
    parts = [own[i : i + micro_batch_size] for i in range(0, len(own), micro_batch_size)]
    batches = [HeldOut(collate(part, pad_id), part) for part in parts]
    most = -(-len(examples) // world_size)
    filler = HeldOut(collate(examples[:1], pad_id), ())
    return batches + [filler] * (-(-most // micro_batch_size) - len(batches))
