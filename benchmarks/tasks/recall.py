# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Associative recall: of Arora et al. 2023 ("Zoology", section 4 and appendix E.1), and from far away."""

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


KEEP, IGNORE, ASK = range(3)  # the mark in front of a pair, and in front of a key that is asked for


@dataclass(frozen=True)
class DistantRecall(Task):
    """Pairs to keep at the start, pairs to ignore from there on; at the end each key: what was its value?

    0 5 9 0 3 8 1 5 7 1 4 9 1 3 7 2 3 2 5 -> at the last 3: 8, at the last 5: 9. The marks are 0 (keep), 1
    (ignore) and 2 (the question). Only the mark tells what is worth keeping: keys and values of what is to be
    ignored are drawn from the same ones. A piece of the text without the start says nothing about how to keep
    a pair, so that backpropagation must reach from the last tokens to the first.

    Args:
        num_kv_pairs: pairs to keep, with different keys.
        num_keys: keys to draw from.
        num_values: values to draw from, each as likely as the others.
    """

    num_kv_pairs: int = 4
    num_keys: int = 8
    num_values: int = 8

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return ASK + 1 + self.num_keys + self.num_values

    @property
    def num_answers(self) -> int:  # type: ignore[override]
        return self.num_values

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See [`Task.sample`].

        Raises:
            ValueError: if the pairs are more than the keys, or do not fit into the length.
        """
        pairs = self.num_kv_pairs
        if pairs > self.num_keys:
            raise ValueError(f"num_kv_pairs={pairs}: expected at most num_keys={self.num_keys}.")
        if length < 5 * pairs:
            raise ValueError(f"length={length}: expected at least 5 times num_kv_pairs={pairs}.")

        def triples(mark: int, keys: Tensor) -> tuple[Tensor, Tensor]:
            values = torch.randint(self.num_values, keys.shape, generator=generator) + first_value
            return torch.stack([torch.full_like(keys, mark), keys, values], dim=2).flatten(1), values

        first_key, first_value = ASK + 1, ASK + 1 + self.num_keys
        keys = first_key + torch.rand(batch_size, self.num_keys, generator=generator).topk(pairs).indices
        kept, values = triples(KEEP, keys)
        missing = length - 5 * pairs
        others = torch.randint(self.num_keys, (batch_size, -(-missing // 3)), generator=generator)
        ignored, _ = triples(IGNORE, others + first_key)
        order = torch.rand(batch_size, pairs, generator=generator).argsort(1)
        asked = torch.stack([torch.full_like(keys, ASK), keys.gather(1, order)], dim=2).flatten(1)
        input_ids = torch.cat([kept, ignored[:, :missing], asked], dim=1)
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, length - 2 * pairs + 1 :: 2] = values.gather(1, order)
        return input_ids, labels

    def train_lengths(self, longest: int) -> list[int]:
        return [longest]


__all__ = ["DistantRecall", "Recall"]
