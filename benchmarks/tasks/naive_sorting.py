# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The accuracy of simple strategies at sorting by frequency, without a model.

    python -m benchmarks.tasks.naive_sorting --lengths 4000 8000 16000 --window 1024

A model's result says something about its memory if it is clearly above what the last tokens alone give, as
many as it sees without a memory.
"""

import torch
from torch import Tensor

from experiments.command_line import COUNT, NOT_NEGATIVE, Parser, run_main

from .sorting import Sorting, sorted_by_count, symbol_counts
from .task import seeded


def naive_accuracies(
    task: Sorting, length: int, window: int, num_test: int = 200, tau: float = 0.75
) -> dict[str, float]:
    """Measures simple strategies on `num_test` sequences. Each is told the answers before the one asked for.

    A strategy guesses the first symbol of its own order that was no answer yet.

    Returns:
        Accuracies of: a random order; the counts of the last `window` tokens; those of a random `window` out
        of all; all counts, by `tau` less for every later block of `window`; and all counts, ties at random.
    """
    generator = seeded(2, length)
    tokens = task.draw(num_test, length, generator)
    answers = sorted_by_count(tokens, task.num_symbols)
    noise = torch.rand(num_test, task.num_symbols, generator=generator, dtype=torch.float64)
    place = torch.arange(length)
    age = (length - 1 - place).div(window, rounding_mode="floor")
    sampled = torch.rand(length, generator=generator).argsort() < window
    weights = {
        "random order": torch.zeros(length),
        f"last {window} tokens": place >= length - window,
        f"random {window} tokens": sampled,
        f"counts decayed by {tau} every {window}": tau ** age.double(),
        "exact counts, random ties": torch.ones(length),
    }
    scores = {name: symbol_counts(tokens, task.num_symbols, weight) for name, weight in weights.items()}
    return {name: _greedy_accuracy(score + 1e-6 * noise, answers) for name, score in scores.items()}


def _greedy_accuracy(scores: Tensor, answers: Tensor) -> float:
    """Returns the share of rows in which the best of `scores` [B, symbols] not yet answered is the answer."""
    left, correct = scores.clone(), []
    for answer in answers.unbind(1):
        correct.append(left.argmax(1) == answer)
        left = left.scatter(1, answer.unsqueeze(1), -torch.inf)
    return torch.stack(correct).double().mean().item()


def main(argv: list[str] | None = None) -> dict[int, dict[str, float]]:
    """Print the naive accuracies at some lengths."""
    parser = Parser(description="Sorting by frequency without a model.")
    parser.add_argument("--lengths", type=COUNT, nargs="+", default=[1000, 2000, 4000, 8000, 16000])
    parser.add_argument("--window", type=COUNT, default=1024, help="Tokens that a model without memory sees.")
    parser.add_argument("--num_test", type=COUNT, default=200, help="Sequences of each length.")
    parser.add_argument("--blend", type=NOT_NEGATIVE, default=1.0, help="The task's option.")
    args = parser.parse_args(argv)
    task = Sorting(blend=args.blend)
    results = {n: naive_accuracies(task, n, args.window, args.num_test) for n in args.lengths}
    print(f"{'':34}" + "".join(f"{length:>8}" for length in results))
    for name in next(iter(results.values())):
        print(f"{name:34}" + "".join(f"{row[name]:8.3f}" for row in results.values()))
    return results


__all__ = ["naive_accuracies"]


if __name__ == "__main__":
    run_main(main)
