# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Sorting a long sequence's tokens by frequency (Martins et al. 2022, "infinity-former", section 4.1).

    python -m benchmarks.tasks.sorting --lengths 4000 8000 16000 --window 1024

prints what is had without a model that remembers all: a result says something about a memory if it is clearly
above what the last `window` tokens alone give.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from .task import IGNORED, Task, seeded


@dataclass(frozen=True)
class Sorting(Task):
    """Which tokens were most frequent, in descending order?    1 2 1 3 1 0 3 1 2 | 1 3 0 2 -> 1 2 3 0

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
        tokens = self._draw(batch_size, length, generator)
        answers = sorted_by_count(tokens, self.num_symbols)
        separator = torch.full_like(answers[:, :1], self.num_symbols)
        input_ids = torch.cat([tokens, separator, answers[:, :-1]], dim=1)
        labels = torch.cat([torch.full_like(tokens, IGNORED), answers], dim=1)
        return input_ids, labels

    def train_lengths(self, longest: int) -> list[int]:
        return [longest]

    def _draw(self, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
        ends = torch.randint(1, 10, (2, batch_size, self.num_symbols), generator=generator).double()
        first, last = ends / ends.sum(-1, keepdim=True)
        ratio = self.blend * torch.arange(1, length + 1, dtype=torch.float64) / length
        # One of the two, then a token of it: that is a token of the blend.
        of_last = torch.rand(batch_size, length, generator=generator, dtype=torch.float64) < ratio
        draws = [p.multinomial(length, replacement=True, generator=generator) for p in (first, last)]
        return torch.where(of_last, draws[1], draws[0])


def sorted_by_count(tokens: Tensor, num_symbols: int, weights: Tensor | None = None) -> Tensor:
    """Symbols [B, num_symbols] by how often they are in `tokens` [B, L], or by the sum of `weights` [L].

    Of symbols with equal counts the one that was there first comes first.
    """
    weights = torch.ones(tokens.shape[1], dtype=torch.float64) if weights is None else weights
    counts = torch.zeros(len(tokens), num_symbols, dtype=torch.float64)
    counts.scatter_add_(1, tokens, weights.expand(tokens.shape))
    places = torch.arange(tokens.shape[1]).expand(tokens.shape)
    begins = torch.full(counts.shape, tokens.shape[1]).scatter_reduce(1, tokens, places, "amin")
    by_place = begins.argsort(dim=1, stable=True)
    by_count = counts.gather(1, by_place).argsort(dim=1, descending=True, stable=True)
    return by_place.gather(1, by_count)


def naive_accuracies(
    task: Sorting, length: int, window: int, num_test: int = 200, tau: float = 0.75
) -> dict[str, float]:
    """What simple strategies have on `num_test` sequences, each told the answers before the one asked for.

    A strategy guesses the first symbol of its own order that was no answer yet.

    Returns:
        Accuracies of: a random order; the counts of the last `window` tokens; those of a random `window` out
        of all; all counts, by `tau` less for every later block of `window`; and all counts, ties at random.
    """
    generator = seeded(2, length)
    tokens = task._draw(num_test, length, generator)
    answers = sorted_by_count(tokens, task.num_symbols)
    noise = torch.rand(num_test, task.num_symbols, generator=generator, dtype=torch.float64)
    counts = torch.nn.functional.one_hot(tokens, task.num_symbols)
    sampled = torch.rand(length, generator=generator).argsort()[:window]
    age = (length - 1 - torch.arange(length)).div(window, rounding_mode="floor")
    scores = {
        "random order": torch.zeros_like(noise),
        f"last {window} tokens": counts[:, -window:].sum(1),
        f"random {window} tokens": counts[:, sampled].sum(1),
        f"counts decayed by {tau} every {window}": torch.einsum("bls,l->bs", counts.double(), tau**age),
        "exact counts, random ties": counts.sum(1),
    }
    return {name: _greedy_accuracy(score + 1e-6 * noise, answers) for name, score in scores.items()}


def _greedy_accuracy(scores: Tensor, answers: Tensor) -> float:
    """How often the best of `scores` [B, symbols] among those not yet answered is the answer."""
    left, correct = scores.clone(), []
    for answer in answers.unbind(1):
        correct.append(left.argmax(1) == answer)
        left = left.scatter(1, answer.unsqueeze(1), -torch.inf)
    return torch.stack(correct).double().mean().item()


def main(argv: list[str] | None = None) -> dict[int, dict[str, float]]:
    """Print the naive accuracies at some lengths."""
    parser = argparse.ArgumentParser(description="Sorting by frequency without a model.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000, 8000, 16000])
    parser.add_argument("--window", type=int, default=1024, help="Tokens that a model without memory sees.")
    parser.add_argument("--num_test", type=int, default=200, help="Sequences of each length.")
    parser.add_argument("--blend", type=float, default=1.0, help="The task's option.")
    args = parser.parse_args(argv)
    task = Sorting(blend=args.blend)
    results = {n: naive_accuracies(task, n, args.window, args.num_test) for n in args.lengths}
    print(f"{'':34}" + "".join(f"{length:>8}" for length in results))
    for name in next(iter(results.values())):
        print(f"{name:34}" + "".join(f"{row[name]:8.3f}" for row in results.values()))
    return results


__all__ = ["Sorting", "naive_accuracies", "sorted_by_count"]


if __name__ == "__main__":
    main()
