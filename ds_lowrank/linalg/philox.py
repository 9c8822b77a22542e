"""The counter-based random generator Philox4x32-10, in integer arithmetic on any device."""

from __future__ import annotations

from typing import cast

import torch

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
WORD = 2**32 - 1
"""The bits of a 32-bit word."""

Word = torch.Tensor | int
Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> Words:
    """Encrypt a counter to four random words: Philox4x32-10 of Salmon et al., SC 2011.

    One round, with ``hi`` and ``lo`` the two words of a 64-bit product and ``k0, k1`` the key::

        c0, c1, c2, c3  <-  hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0)

    Between rounds each word of the key grows by a constant. Integers are exact, so all devices give the same words.

    Args:
        counter: four words from 0 to 2**32 - 1, int64 or Python's integers. They broadcast against one another and
            against the key, and at least one of the six is a tensor. What depends on few of them is computed in their
            shape: with a row, a column and two zeros, the first two of the ten rounds cost nearly nothing.
        key: two such words.

    Returns:
        Four tensors of the common shape, int64, words from 0 to 2**32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        even, odd = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # c1, c3 and the key may have bits above the word: only sums and exclusive ors read them, before the next mask.
        c0, c2 = _high(odd, c1 ^ k0), _high(even, c3 ^ k1)
        c1, c3 = odd, even
        k0, k1 = k0 + KEY_STEPS[0], k1 + KEY_STEPS[1]
    return cast(Words, (c0, c1 & WORD, c2, c3 & WORD))


def _high(product: Word, other: Word) -> Word:
    """The high word of a product of two words, exclusive or the low word of ``other``.

    Where the product leaves int64 it wraps, and the shift then drags the sign along, which the mask removes.
    """
    high = (product >> 32) ^ other
    high &= WORD  # in place: the exclusive or made a new tensor
    return high
