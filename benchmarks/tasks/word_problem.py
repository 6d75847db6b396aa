# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""State tracking: the word problem of a finite group (Merrill et al. 2024, "The Illusion of State in
State-Space Models", section 5)."""

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import torch
from torch import Tensor

from .task import Task


@dataclass(frozen=True)
class WordProblem(Task):
    """The product of all group elements so far, asked for at every position.

    As there, training draws lengths from 2 on, so that the group's table is seen by itself, too.

    Args:
        group: a letter and a number of points: "S5" all permutations, "A5" (60, not solvable) the even ones,
            "Z60" the rotations. Elements are numbered in the order of their permutations, the identity is 0.
    """

    group: str = "A5"

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return len(multiplication_table(self.group))

    @property
    def num_answers(self) -> int:  # type: ignore[override]
        return self.vocab_size

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        table = multiplication_table(self.group)
        words = torch.randint(len(table), (batch_size, length), generator=generator)
        products = [words[:, 0]]
        for element in words[:, 1:].unbind(1):
            products.append(table[products[-1], element])
        return words, torch.stack(products, dim=1)

    def train_lengths(self, longest: int) -> range:
        return range(2, longest + 1)


def group_elements(group: str) -> list[tuple[int, ...]]:
    """The permutations of a group, in lexicographic order.

    Raises:
        ValueError: if `group` is not S, A or Z and a number of points.
    """
    kind, points = group[:1], group[1:]
    if kind not in ("S", "A", "Z") or not points.isdecimal() or int(points) < 1:
        raise ValueError(f"group={group!r}: expected S, A or Z and a number of points, such as A5.")
    size = int(points)
    if kind == "Z":
        return [tuple((i + shift) % size for i in range(size)) for shift in range(size)]
    return [p for p in permutations(range(size)) if kind == "S" or _is_even(p)]


@cache
def multiplication_table(group: str) -> Tensor:
    """[g, h] -> the number of g h, which maps a point i to g(h(i))."""
    elements = group_elements(group)
    number = {element: i for i, element in enumerate(elements)}
    return torch.tensor([[number[tuple(g[i] for i in h)] for h in elements] for g in elements])


def _is_even(permutation: tuple[int, ...]) -> bool:
    inversions = sum(a > b for i, a in enumerate(permutation) for b in permutation[i + 1 :])
    return inversions % 2 == 0


__all__ = ["WordProblem", "group_elements", "multiplication_table"]
