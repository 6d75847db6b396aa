# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Sorting a long sequence's tokens by frequency (Martins et al. 2022, "infinity-former", section 4.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .task import IGNORED, Task


@dataclass(frozen=True)
class Sorting(Task):
    """Sorts tokens by how frequent they were, in descending order.    1 2 1 3 1 0 3 1 2 | 1 3 0 2 -> 1 2 3 0

    As in the authors' `generate_data.py`: token j of L is drawn from (1 - j/L) p_0 + (j/L) p_1, with two
    random distributions p (integers of 1 to 9, normalised); after a separator come all tokens, the most
    frequent first, of equally frequent ones the one that was there first, those that are absent last and
    ascending. The answers are given to the model, one late: each is asked for at the one before it, the first
    at the separator. L is the length asked for; the paper has 4,000, 8,000 and 16,000, and trains on each.

    Args:
        num_symbols: tokens to sort; the separator is one more.
        blend: how far the distribution moves in a sequence: 1 from p_0 to p_1, 0 not at all.
    """

    num_symbols: int = 20
    blend: float = 1.0

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.num_symbols + 1

    @property
    def num_answers(self) -> int:  # type: ignore[override]
        return self.num_symbols

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See [`Task.sample`]."""
        tokens = self.draw(batch_size, length, generator)
        answers = sorted_by_count(tokens, self.num_symbols)
        separator = torch.full_like(answers[:, :1], self.num_symbols)
        input_ids = torch.cat([tokens, separator, answers[:, :-1]], dim=1)
        labels = torch.cat([torch.full_like(tokens, IGNORED), answers], dim=1)
        return input_ids, labels

    def train_lengths(self, longest: int) -> list[int]:
        return [longest]

    def draw(self, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
        """The tokens [batch_size, length] to be sorted."""
        ends = torch.randint(1, 10, (2, batch_size, self.num_symbols), generator=generator).double()
        first, last = ends / ends.sum(-1, keepdim=True)
        ratio = self.blend * torch.arange(1, length + 1, dtype=torch.float64) / length
        # One of the two, then a token of it: that is a token of the blend.
        of_last = torch.rand(batch_size, length, generator=generator, dtype=torch.float64) < ratio
        draws = [p.multinomial(length, replacement=True, generator=generator) for p in (first, last)]
        return torch.where(of_last, draws[1], draws[0])


def symbol_counts(tokens: Tensor, num_symbols: int, weights: Tensor) -> Tensor:
    """Counts each symbol in `tokens` [B, L], each place by its weight [L]: [B, num_symbols]."""
    counts = torch.zeros(len(tokens), num_symbols, dtype=torch.float64)
    return counts.scatter_add(1, tokens, weights.double().expand(tokens.shape))


def sorted_by_count(tokens: Tensor, num_symbols: int) -> Tensor:
    """Symbols [B, num_symbols] by how often they are in `tokens` [B, L].

    Of symbols with equal counts the one that was there first comes first.
    """
    counts = symbol_counts(tokens, num_symbols, torch.ones(tokens.shape[1]))
    places = torch.arange(tokens.shape[1]).expand(tokens.shape)
    begins = torch.full(counts.shape, tokens.shape[1]).scatter_reduce(1, tokens, places, "amin")
    by_place = begins.argsort(dim=1, stable=True)
    by_count = counts.gather(1, by_place).argsort(dim=1, descending=True, stable=True)
    return by_place.gather(1, by_count)


__all__ = ["Sorting", "sorted_by_count", "symbol_counts"]
