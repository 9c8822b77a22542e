"""The elements of a logical matrix where DeepSpeed stores them, and of several matrices as few views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_lowrank.sharding.layout import Spans


@dataclass
class Fragment:
    """The elements of one logical matrix in a store.

    Attributes:
        store: the tensor that DeepSpeed updates in one ``step()``: the parameter itself, its fp32 clone, or a flat
            partition.
        spans: ranges of the flat store; one, or several if the weight is fused.
    """

    store: torch.Tensor
    spans: Spans

    @property
    def weights(self) -> torch.Tensor:
        """The elements, flat: a view of the store if they are one span, otherwise a copy for :meth:`put`."""
        return self._of(self.store.data.view(-1))

    @property
    def gradient(self) -> torch.Tensor:
        """The gradient of these elements, flat; only while the store has a gradient."""
        gradient = self.store.grad
        assert gradient is not None
        return self._of(gradient.reshape(-1))

    def _of(self, flat: torch.Tensor) -> torch.Tensor:
        """Select the spans from a tensor of the store's elements: a view of one span, a copy of several."""
        if len(self.spans) == 1:
            start, end = self.spans[0]
            return flat if end - start == flat.shape[0] else flat[start:end]
        return torch.cat([flat[:0], *(flat[lo:hi] for lo, hi in self.spans)])

    def put(self, weights: torch.Tensor) -> None:
        """Write changed :attr:`weights` back into the store; nothing to do if they are a view of it.

        Args:
            weights: the elements, flat.
        """
        if len(self.spans) == 1:
            return
        flat = self.store.data.view(-1)
        for (lo, hi), piece in zip(self.spans, torch.split(weights, [b - a for a, b in self.spans]), strict=True):
            flat[lo:hi] = piece


class FragmentRun:
    """Fragments of as many elements each that are evenly spaced in one store, or a single fragment.

    Args:
        fragments: in storage order.
        spacing: elements between the beginnings of two neighbors.

    Attributes:
        count: how many fragments there are.
        is_copied: whether their elements are no view of the store, so that changed weights have to be put back.
    """

    def __init__(self, fragments: Sequence[Fragment], spacing: int) -> None:
        self._first, self.count, self._spacing = fragments[0], len(fragments), spacing
        self.is_copied = len(self._first.spans) != 1
        self._is_whole = self._first.spans == ((0, self._first.store.numel()),)

    @property
    def gradient(self) -> torch.Tensor:
        """The gradients: the store's own if it is one matrix, else matrices x elements, a view unless it is fused."""
        if self.count == 1 and not self._is_whole:
            return self._first.gradient.unsqueeze(0)
        gradient = self._first.store.grad
        assert gradient is not None
        if self._is_whole:
            return gradient if gradient.is_contiguous() else gradient.contiguous()
        return self._view(gradient.reshape(-1))

    @property
    def weights(self) -> torch.Tensor:
        """The weights: the store's own if it is one matrix, else matrices x elements, a view unless it is fused."""
        if self._is_whole:
            return self._first.store.data
        return self._first.weights.unsqueeze(0) if self.count == 1 else self._view(self._first.store.data.view(-1))

    def _view(self, flat: torch.Tensor) -> torch.Tensor:
        start, end = self._first.spans[0]
        size, stride = (self.count, end - start), (self._spacing, 1)
        return flat.as_strided(size, stride, flat.storage_offset() + start)

    def put(self, weights: torch.Tensor) -> None:
        """Write changed :attr:`weights` back into the store, if they are a copy.

        Args:
            weights: 1 x elements.
        """
        self._first.put(weights[0])


def runs_of(fragments: Sequence[Fragment]) -> list[FragmentRun]:
    """Cut fragments of as many elements each into runs that are evenly spaced in one store.

    Args:
        fragments: of the matrices of a stack, in order.
    """
    runs: list[FragmentRun] = []
    open_run: list[Fragment] = []
    spacing = 0
    for fragment in fragments:
        gap = _gap(open_run[-1], fragment) if open_run else None
        if gap is not None and (len(open_run) == 1 or gap == spacing):
            open_run.append(fragment)
            spacing = gap
            continue
        if open_run:
            runs.append(FragmentRun(open_run, spacing))
        open_run, spacing = [fragment], 0
    return [*runs, FragmentRun(open_run, spacing)]


def _gap(before: Fragment, after: Fragment) -> int | None:
    """How far behind a fragment another one begins in the same store; None if they have no such order."""
    if before.store is not after.store or len(before.spans) != 1 or len(after.spans) != 1:
        return None
    gap = after.spans[0][0] - before.spans[0][0]
    return gap if gap >= before.spans[0][1] - before.spans[0][0] > 0 else None
