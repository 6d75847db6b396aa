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


ASK, KEEP, KEEP_TOO, FIRST_IGNORED = range(4)  # marks in front of a question, and in front of pairs


@dataclass(frozen=True)
class DistantRecall(Task):
    """Pairs to keep at the start, pairs to ignore from there on; at the end each key: what was its value?

    1 9 13 1 7 15 3 9 14 4 8 13 3 7 14 0 7 0 9 -> at the last 7: 15, at the last 9: 13. Every pair has a mark
    in front of it: 1 for one to keep, any of some others (here 3 and 4) for one to ignore. Only the mark
    tells, since keys and values are the same ones. A piece of the text without the start says nothing about
    how to keep a pair: what is wrong at a question has to reach the first tokens.

    Args:
        num_kv_pairs: pairs to keep, with different keys.
        num_keys: keys to draw from.
        num_values: values to draw from, each as likely as the others.
        num_ignored_marks: marks of pairs to ignore.
        other_mark: mark the pairs to keep with 2 instead of 1.
    """

    num_kv_pairs: int = 4
    num_keys: int = 8
    num_values: int = 8
    num_ignored_marks: int = 6
    other_mark: bool = False

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return FIRST_IGNORED + self.num_ignored_marks + self.num_keys + self.num_values

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
        first_key = FIRST_IGNORED + self.num_ignored_marks
        missing = length - 5 * pairs
        ignored = (batch_size, -(-missing // 3))

        def some(first: int, count: int, shape: tuple[int, int]) -> Tensor:
            return first + torch.randint(count, shape, generator=generator)

        keys = first_key + torch.rand(batch_size, self.num_keys, generator=generator).topk(pairs).indices
        values = some(first_key + self.num_keys, self.num_values, (batch_size, pairs))
        kept = _interleaved(torch.full_like(keys, KEEP_TOO if self.other_mark else KEEP), keys, values)
        distraction = _interleaved(
            some(FIRST_IGNORED, self.num_ignored_marks, ignored),
            some(first_key, self.num_keys, ignored),
            some(first_key + self.num_keys, self.num_values, ignored),
        )
        order = torch.rand(batch_size, pairs, generator=generator).argsort(1)
        questions = _interleaved(torch.full_like(keys, ASK), keys.gather(1, order))
        input_ids = torch.cat([kept, distraction[:, :missing], questions], dim=1)
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, length - 2 * pairs + 1 :: 2] = values.gather(1, order)
        return input_ids, labels

    def train_lengths(self, longest: int) -> list[int]:
        return [longest]


def _interleaved(*tokens: Tensor) -> Tensor:
    """The first of each [B, n], the second of each, and so on: [B, n * number of tensors]."""
    return torch.stack(tokens, dim=2).flatten(1)


__all__ = ["DistantRecall", "Recall"]
