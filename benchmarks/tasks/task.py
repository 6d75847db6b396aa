# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The base class of generated tasks: sequences of any length, with labels where an answer is expected.

Letters: B batch, L length that the task is asked for, T tokens of a sequence.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the label of a position where no answer is asked for


class Task:
    """One task; a subclass is a dataclass whose fields are the task's options.

    Args:
        vocab_size (`int`): tokens; inputs and answers share their ids.
        num_answers (`int`): answers to choose from, so that guessing is right once in `num_answers`.
    """

    vocab_size: int
    num_answers: int

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`batch_size` new sequences of one length.

        Returns:
            The tokens [B, T], and the labels [B, T]: what the output *at* each position has to be (they are
            not the next tokens, so nothing is to be shifted), `IGNORED` where it does not matter.
        """
        raise NotImplementedError

    def train_lengths(self, longest: int) -> Sequence[int]:
        """The lengths that training draws from, one for each batch: all up to `longest`."""
        return range(1, longest + 1)


def on_empty_tape(tokens: Tensor, answers: Tensor, empty: int) -> tuple[Tensor, Tensor]:
    """The input [B, L], then one `empty` token for each answer [B, A] for it to be given at: [B, L + A]."""
    input_ids = torch.cat([tokens, torch.full_like(answers, empty)], dim=1)
    return input_ids, torch.cat([torch.full_like(tokens, IGNORED), answers], dim=1)


def seeded(*key: int) -> torch.Generator:
    """A generator of its own for each tuple of non-negative integers."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed))


__all__ = ["IGNORED", "Task", "on_empty_tape", "seeded"]
