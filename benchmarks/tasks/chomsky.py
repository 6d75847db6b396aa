# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Tasks of "Neural Networks and the Chomsky Hierarchy" (Deletang et al. 2022).

As there, the input of L tokens is followed by as many empty tokens as there are answers, and every answer is
given at an empty token without having seen the ones before it. Training draws a length from 1 to the longest
for each batch; a task counts as solved from 90 % accuracy on lengths beyond those on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .task import IGNORED, Task, on_empty_tape

CYCLE_LENGTH = 5
POP, FIRST_PUSH, END_OF_STACK = 2, 3, 2  # 0 and 1 are on the stack already, 3 and 4 push a 0 and a 1


@dataclass(frozen=True)
class Parity(Task):
    """Regular: is the number of ones odd?    1 0 1 0 1 0 0 -> 1"""

    vocab_size = 3
    num_answers = 2

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        bits = torch.randint(2, (batch_size, length), generator=generator)
        return on_empty_tape(bits, bits.sum(1, keepdim=True) % 2, empty=2)


@dataclass(frozen=True)
class CycleNavigation(Task):
    """Regular: where on a cycle of 5 do steps of -1, 0 and 1 (tokens 0, 1, 2) end?    2 2 2 0 -> 2"""

    vocab_size = CYCLE_LENGTH + 1
    num_answers = CYCLE_LENGTH

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        steps = torch.randint(3, (batch_size, length), generator=generator)
        return on_empty_tape(steps, (steps - 1).sum(1, keepdim=True) % CYCLE_LENGTH, empty=CYCLE_LENGTH)


@dataclass(frozen=True)
class ReverseString(Task):
    """Deterministic context-free: the bits, the last first.    0 1 1 0 1 0 -> 0 1 0 1 1 0"""

    vocab_size = 3
    num_answers = 2

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        bits = torch.randint(2, (batch_size, length), generator=generator)
        return on_empty_tape(bits, bits.flip(1), empty=2)


@dataclass(frozen=True)
class DuplicateString(Task):
    """Context-sensitive: the bits twice over.    1 0 1 -> 1 0 1 1 0 1"""

    vocab_size = 3
    num_answers = 2

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        bits = torch.randint(2, (batch_size, length), generator=generator)
        return on_empty_tape(bits, bits.repeat(1, 2), empty=2)


@dataclass(frozen=True)
class StackManipulation(Task):
    """Deterministic context-free: a stack of bits, bottom first, then POP (2), PUSH 0 (3) and PUSH 1 (4).

    The answers are the final stack, top first, then 2 for its end; popping an empty stack does nothing.
    0 1 1 0 4 2 2 -> 1 1 0 2. As in the paper's accuracy, what would follow the end is not asked for (the
    paper's loss asks for zeros there).
    """

    vocab_size = 6
    num_answers = 3

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        shape = (batch_size, length)
        initial = torch.randint(1, max(length, 2), (batch_size, 1), generator=generator)
        bits = torch.randint(2, shape, generator=generator)
        actions = torch.randint(POP, FIRST_PUSH + 2, shape, generator=generator)
        tokens = bits.where(torch.arange(length) < initial, actions)

        rows = torch.arange(batch_size)
        stack = torch.zeros(batch_size, length + 1, dtype=torch.long)
        height = torch.zeros(batch_size, dtype=torch.long)
        for token in tokens.unbind(1):
            stack[rows, height] = token % FIRST_PUSH  # what lies at or above the height is not on the stack
            height = torch.where(token == POP, height - 1, height + 1).clamp(min=0)

        from_top = height.unsqueeze(1) - 1 - torch.arange(length + 1)
        answers = stack.gather(1, from_top.clamp(min=0))
        answers[from_top == -1] = END_OF_STACK
        answers[from_top < -1] = IGNORED
        return on_empty_tape(tokens, answers, empty=5)


__all__ = ["CycleNavigation", "DuplicateString", "Parity", "ReverseString", "StackManipulation"]
