"""What one rank sends and receives in a round, computed once for all rounds that are alike.

A round moves words: as many numbers at a time as divide every tensor's row. All values of a round, what is received and
one word of zeros lie behind one another in a buffer. To send is then one gather from the buffer, and so is to answer.
Words to which several ranks contribute are gathered once for every contributor, in rank order, and added in pairs,
first half to second half, filled up with zeros to a power of two. How a word is added up depends on the number of
its contributors alone, so that all ranks that want it get the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import gcd

import numpy as np
import torch

from ds_lowrank.sharding.requests import Request
from ds_lowrank.sharding.route import Rows, SumRoute

MOST_PLANS = 256
"""Plans that are kept; the oldest is dropped."""
NOTHING: Rows = np.empty(0, dtype=np.int64)


class Plan:
    """One rank's side of a round.

    Args:
        requests: the rank's requests.
        rank: the rank.
        ranks: number of ranks.

    Attributes:
        word: numbers per word.
        send_sizes: how many numbers go to each rank.
        receive_sizes: how many numbers come from each rank.
    """

    def __init__(self, requests: Sequence[Request], rank: int, ranks: int) -> None:
        self.routes = [request.route for request in requests]  # kept alive: their ids are in the key of the plan
        self._rank, self._ranks = rank, ranks
        self._device = requests[0].value.device
        shapes = [request.value.shape for request in requests]
        self._shapes = [request.answer_shape(rank) for request in requests]
        self._kept = [
            request.is_identity(rank) and request.value.shape == shape
            for request, shape in zip(requests, self._shapes, strict=True)
        ]
        self._packed = [
            not (kept and request.is_silent(rank)) for request, kept in zip(requests, self._kept, strict=True)
        ]
        columns = [shape[2] for shape, packed in zip(shapes, self._packed, strict=True) if packed]
        self.word = gcd(*columns) if columns else 1
        sizes = [shape.numel() // self.word * packed for shape, packed in zip(shapes, self._packed, strict=True)]
        self._values = list(accumulate(sizes, initial=0))
        answers = [
            shape[0] * shape[1] * shape[2] // self.word * (not kept)
            for shape, kept in zip(self._shapes, self._kept, strict=True)
        ]
        self._answers = list(accumulate(answers, initial=0))
        sends, receives = self._messages(requests)
        self.send_sizes = [len(sends.get(peer, NOTHING)) * self.word for peer in range(ranks)]
        self.receive_sizes = [len(receives.get(peer, NOTHING)) * self.word for peer in range(ranks)]
        self.receive_sizes[rank] = 0
        self._send = self._index(np.concatenate([NOTHING, *(sends[peer] for peer in sorted(sends))]))
        self._assemble(receives)

    def _index(self, words: Rows) -> torch.Tensor:
        return torch.from_numpy(words).to(self._device)

    def _messages(self, requests: Sequence[Request]) -> tuple[dict[int, Rows], dict[int, Rows]]:
        """For each other rank, the words of this rank's values that go to it; for each rank, the answered words.

        Under this rank's own number, the answered words are those that it has itself; :attr:`_own` says which.
        """
        sends: dict[int, list[Rows]] = {}
        receives: dict[int, list[Rows]] = {}
        own: list[Rows] = []
        for number, request in enumerate(requests):
            if not self._packed[number] or isinstance(request.route, SumRoute):
                continue
            starts = request.route.starts(self._rank)
            per_row = request.value.shape[2] // self.word
            for route, positions in request.route.routes:
                side = route.side(self._rank)
                for peer, rows in side.sends.items():
                    words = _words(starts[0][positions], rows, per_row) + self._values[number]
                    sends.setdefault(peer, []).append(words)
                for peer, rows in side.receives.items() if not self._kept[number] else ():
                    words = _words(starts[1][positions], rows, per_row) + self._answers[number]
                    receives.setdefault(peer, []).append(words)
                    if peer == self._rank:
                        own.append(_words(starts[0][positions], side.keeps, per_row) + self._values[number])
        for values, answered, peers in self._sums(requests):
            for peer in peers:
                receives.setdefault(peer, []).append(answered)
                if peer == self._rank:
                    own.append(values)
                else:
                    sends.setdefault(peer, []).append(values)
        self._own = np.concatenate([NOTHING, *own])
        return _joined(sends), _joined(receives)

    def _sums(self, requests: Sequence[Request]) -> Iterable[tuple[Rows, Rows, Iterable[int]]]:
        """The words of all sums in the order that all ranks know, in runs with the same peers."""
        entries = []
        for number, request in enumerate(requests):
            if isinstance(request.route, SumRoute) and self._packed[number]:
                words = request.value.shape[1] * request.value.shape[2] // self.word
                for position, (key, peers) in enumerate(zip(request.route.numbers, request.route.peers, strict=True)):
                    start = position * words
                    entries.append((key, number, start, words, peers))
        by_peers: dict[frozenset[int], list[tuple[int, int, int]]] = {}
        for _, number, start, words, peers in sorted(entries, key=lambda entry: entry[:2]):
            by_peers.setdefault(peers, []).append((number, start, words))
        for peers, runs in by_peers.items():
            values = [np.arange(words) + self._values[number] + start for number, start, words in runs]
            answered = [np.arange(words) + self._answers[number] + start for number, start, words in runs]
            yield np.concatenate(values), np.concatenate(answered), sorted(peers)

    def _assemble(self, receives: dict[int, Rows]) -> None:
        """Find where in the buffer each answered word's contributions are."""
        received = sum(self.receive_sizes) // self.word
        zero = self._values[-1] + received
        self._size = zero + 1
        targets, sources, position = [], [], self._values[-1]
        for peer in sorted(receives):
            words = receives[peer]
            targets.append(words)
            if peer == self._rank:
                sources.append(self._own)
            else:
                sources.append(np.arange(position, position + len(words)))
                position += len(words)
        target, source = np.concatenate([NOTHING, *targets]), np.concatenate([NOTHING, *sources])
        order = np.argsort(target, kind="stable")  # the contributions to a word stay in rank order
        target, source = target[order], source[order]
        counts = np.bincount(target, minlength=self._answers[-1])
        first = counts.cumsum() - counts
        found = np.full(self._answers[-1], zero, dtype=np.int64)
        found[counts > 0] = source[first[counts > 0]]
        self._found = self._index(found)
        self._added = []
        terms = 2
        while terms < 2 * max(counts.max(initial=1), 1):
            several = np.flatnonzero((counts > terms // 2) & (counts <= terms))
            if len(several):
                places = first[several] + np.arange(terms)[:, None]
                exists = np.arange(terms)[:, None] < counts[several]
                words = np.where(exists, source[np.minimum(places, len(source) - 1)], zero)
                self._added.append((terms, self._index(several), self._index(words.reshape(-1))))
            terms *= 2

    def pack(self, requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        """Put all values into a buffer, and gather from it what is sent.

        Args:
            requests: like those that the plan was made for.

        Returns:
            The buffer, words x ``word``, and the flat numbers to send, in the order of the receivers; both fp32.
        """
        buffer = torch.empty(self._size, self.word, dtype=torch.float32, device=self._device)
        values = [request.value for request, packed in zip(requests, self._packed, strict=True) if packed]
        if values:
            torch.cat([value.reshape(-1, self.word).float() for value in values], out=buffer[: self._values[-1]])
        buffer[-1] = 0
        return buffer, buffer.index_select(0, self._send).view(-1)

    def received(self, buffer: torch.Tensor) -> torch.Tensor:
        """Where in a buffer the numbers from the other ranks belong: a flat view."""
        return buffer[self._values[-1] : -1].view(-1)

    def answers(self, requests: Sequence[Request], buffer: torch.Tensor) -> list[torch.Tensor]:
        """Answer the requests from the buffer of :meth:`pack`, once what was received is in it.

        Args:
            requests: those that were packed.
            buffer: words x ``word``, fp32.

        Returns:
            Each answer, matrices x rows x columns, fp32.
        """
        found = buffer.index_select(0, self._found) if self._answers[-1] else buffer[:0]
        for terms, several, words in self._added:
            total = buffer.index_select(0, words).view(terms, len(several), self.word)
            while len(total) > 1:
                half = len(total) // 2
                total = total[:half] + total[half:]
            found.index_copy_(0, several, total[0])
        return [
            request.value.float() if kept else found[start:end].view(shape)
            for request, kept, shape, (start, end) in zip(
                requests, self._kept, self._shapes, zip(self._answers[:-1], self._answers[1:], strict=True), strict=True
            )
        ]


class Plans:
    """The plans of one rank.

    Args:
        rank: the rank.
        ranks: number of ranks.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks
        self._plans: dict[tuple[tuple[int, torch.Size], ...], Plan] = {}

    def plan(self, requests: Sequence[Request]) -> Plan:
        """The plan of a round; made when it is needed for the first time.

        Args:
            requests: the rank's requests.
        """
        key = tuple((id(request.route), request.value.shape) for request in requests)
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = Plan(requests, self._rank, self._ranks)
            if len(self._plans) > MOST_PLANS:
                del self._plans[next(iter(self._plans))]
        return found


def _words(starts: Rows, rows: Rows, per_row: int) -> Rows:
    """The words of some rows of some matrices: matrix by matrix, row by row.

    Args:
        starts: the position of each matrix's first row.
        rows: positions within a matrix.
        per_row: words per row.
    """
    places = (starts[:, None] + rows[None, :]) * per_row
    words: Rows = (places[:, :, None] + np.arange(per_row)).reshape(-1)
    return words


def _joined(pieces: dict[int, list[Rows]]) -> dict[int, Rows]:
    return {peer: np.concatenate(rows) for peer, rows in pieces.items()}
