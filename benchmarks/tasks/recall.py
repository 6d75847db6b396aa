# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Multi-query associative recall (Arora et al. 2023, "Zoology", section 4 and appendix E.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .task import IGNORED, Task


@dataclass(frozen=True)
class Recall(Task):
    """Keys with their values, then each key once more, in places of its own: what was its value?

    2 8 4 7 0 0 4 0 0 0 0 0 2 0 -> at the second 4: 7, at the second 2: 8. Drawn as in zoology's
    `multiquery_ar`: keys from the lower half of the vocabulary (without 0) and values from the upper half,
    all distinct; the gap between a pair and its query, in pairs of tokens, follows a power law. The length is
    that of the sequence, and training is at the longest only. Zoology's figure 2 has 8,192 tokens, and 64,
    128, 256 tokens with 4, 8, 16 pairs.

    Args:
        vocab_size: tokens.
        num_kv_pairs: pairs in a sequence; one for every 16 tokens, as in figure 2, if `None`.
        power_a: exponent of the power law; 1 for a uniform distribution.
        random_non_queries: fill the places between queries with random tokens instead of zeros.
    """

    vocab_size: int = 8192
    num_kv_pairs: int | None = None
    power_a: float = 0.01
    random_non_queries: bool = False

    @property
    def num_answers(self) -> int:  # type: ignore[override]
        return self.vocab_size - self.vocab_size // 2

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See [`Task.sample`].

        Raises:
            ValueError: if the length is odd or too short for the pairs, or the vocabulary has too few keys.
        """
        pairs = length // 16 if self.num_kv_pairs is None else self.num_kv_pairs
        num_keys = self.vocab_size // 2 - 1
        if length % 2 or not 4 <= 4 * pairs <= length:
            raise ValueError(
                f"length={length}: expected an even one of at least 4 times {pairs} pairs, and one."
            )
        if pairs > num_keys:
            raise ValueError(
                f"vocab_size={self.vocab_size}: expected at least {2 * pairs + 2} for {pairs} pairs."
            )

        def distinct(first: int, choices: int) -> Tensor:
            return first + torch.rand(batch_size, choices, generator=generator).topk(pairs).indices

        keys, values = distinct(1, num_keys), distinct(num_keys + 1, self.num_answers)
        input_ids = torch.zeros(batch_size, length, dtype=torch.long)
        input_ids[:, 0 : 2 * pairs : 2], input_ids[:, 1 : 2 * pairs : 2] = keys, values

        gap = torch.arange(1, length // 2 - pairs + 1, dtype=torch.float64)
        weights = (gap ** (self.power_a - 1)).expand(batch_size, -1)
        places = 2 * pairs + 2 * torch.multinomial(weights, pairs, generator=generator)
        input_ids.scatter_(1, places, keys)
        labels = torch.full_like(input_ids, IGNORED).scatter_(1, places, values)
        if self.random_non_queries:
            noise = torch.randint(self.vocab_size, input_ids.shape, generator=generator)
            input_ids = input_ids.where(input_ids != 0, noise)
        return input_ids, labels

    def train_lengths(self, longest: int) -> list[int]:
        return [longest]


__all__ = ["Recall"]
