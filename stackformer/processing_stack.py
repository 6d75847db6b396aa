# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The differentiable processing stack: where a token thinks (pointer), what it keeps (frames), when it stops.

Pure functions on tensors. The stack is a superposition stack (Joulin & Mikolov 2015, "Inferring Algorithmic
Patterns with Stack-Augmented Recurrent Nets", equations 1 to 5) whose frames are embeddings of one token;
what leaves it at the bottom is accumulated as in Adaptive Computation Time (Graves 2016, equation 13).

Letters: D hidden size, S stack levels, P ponder steps; "..." are any leading dimensions. Level 0 is
the bottom. The pointer is a distribution over levels that loses mass as
the token finishes: its sum plus the mass that was dropped is always 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .dtypes import at_least_float32

PUSH, NO_OP, POP = range(3)


class Stack(NamedTuple):
    """The state that a token carries from one ponder step to the next."""

    pointer: Tensor  # [..., S], probability mass on each level, >= 0
    frames: Tensor  # [..., S, D], the embedding stack
    output: Tensor  # [..., D], sum of dropped mass * what the token was thinking then
    dropped: Tensor  # [..., P], mass dropped at each step: in the end, the distribution over halting steps


class Transfer(NamedTuple):
    """The mass that moves in one step: by level [..., S], and off the bottom [...]."""

    kept: Tensor  # stays on its level
    from_below: Tensor  # arrives by a push
    from_above: Tensor  # arrives by a pop
    popped: Tensor  # leaves its level downwards
    dropped: Tensor  # leaves the stack: what the bottom level popped


def init_stack(embedding: Tensor, depth: int, max_steps: int) -> Stack:
    """All mass on level 0, every frame holding the token's embedding [..., D]; P is `max_steps`."""
    pointer = embedding.new_zeros(*embedding.shape[:-1], depth, dtype=at_least_float32(embedding))
    pointer[..., 0] = 1
    frames = embedding.unsqueeze(-2).expand(*embedding.shape[:-1], depth, embedding.shape[-1])
    dropped = pointer.new_zeros(*embedding.shape[:-1], max_steps)
    return Stack(pointer, frames, torch.zeros_like(embedding), dropped)


def read_stack(stack: Stack) -> Tensor:
    """The superposition of the frames under the pointer [..., D]: sum_s p_s E_s / sum_s p_s."""
    mass = stack.pointer.sum(-1, keepdim=True)
    weights = stack.pointer / mass.clamp(min=torch.finfo(mass.dtype).tiny)  # without mass, 0
    return (weights.to(stack.frames.dtype).unsqueeze(-2) @ stack.frames).squeeze(-2)


def transfer_mass(pointer: Tensor, actions: Tensor) -> Transfer:
    """Split each level's mass by what the token does. A push at the top level stays there.

    Args:
        pointer: [..., S].
        actions: [..., 3], probabilities of push (call a subroutine), no-op and pop (return from it).
    """
    push, no_op, pop = actions.unsqueeze(-1).unbind(-2)  # [..., 1] each
    nothing = torch.zeros_like(pointer[..., :1])
    pushed, popped = push * pointer, pop * pointer
    from_below = torch.cat([nothing, pushed[..., :-1]], dim=-1)
    from_above = torch.cat([popped[..., 1:], nothing], dim=-1)
    kept = no_op * pointer + torch.cat([torch.zeros_like(pushed[..., :-1]), pushed[..., -1:]], dim=-1)
    return Transfer(kept, from_below, from_above, popped, popped[..., 0])


def write_back(
    frames: Tensor,
    pointer: Tensor,
    transfer: Transfer,
    thought: Tensor,
    embedding: Tensor,
    norm: Callable[[Tensor], Tensor],
) -> Tensor:
    """Scatter one step's result over the frames [..., S, D].

    The frame in use takes the thought, whether it goes on or calls; a call copies the thought one level up; a
    return is added to the caller's frame and normalised; a frame that returned is erased to the token's
    embedding. The weights of each new frame sum to at most one, so the stack stays bounded.

    Args:
        frames: [..., S, D]; pointer: [..., S], before the step; transfer: of this step.
        thought: [..., D], what the core made of the superposition.
        embedding: [..., D], the token's embedding.
        norm: normalisation of the caller's frame plus what was returned to it.
    """
    thought, embedding = thought.unsqueeze(-2), embedding.unsqueeze(-2)

    def weight(mass: Tensor) -> Tensor:
        return mass.to(frames.dtype).unsqueeze(-1)

    new = weight(1 - pointer - transfer.from_below - transfer.from_above) * frames
    new = torch.addcmul(new, weight(pointer - transfer.popped + transfer.from_below), thought)
    new = torch.addcmul(new, weight(transfer.popped), embedding)
    if frames.shape[-2] > 1:
        new = torch.addcmul(new, weight(transfer.from_above), norm(frames + thought))
    return new


def step_stack(
    stack: Stack,
    actions: Tensor,
    thought: Tensor,
    embedding: Tensor,
    step: int,
    norm: Callable[[Tensor], Tensor],
) -> Stack:
    """One ponder step: move the mass, write the thought back, accumulate what fell off the bottom.

    Args:
        stack: before the step; actions: [..., 3]; thought, embedding: [..., D]; step: 1 for the first.
    """
    transfer = transfer_mass(stack.pointer, actions)
    frames = write_back(stack.frames, stack.pointer, transfer, thought, embedding, norm)
    output, dropped = accumulate(stack, transfer.dropped, thought, step)
    return Stack(transfer.kept + transfer.from_below + transfer.from_above, frames, output, dropped)


def accumulate(stack: Stack, mass: Tensor, thought: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Output and dropped mass after `mass` [...] left at a step, thinking `thought` [..., D]."""
    mass = mass.unsqueeze(-1)
    output = stack.output + mass.to(thought.dtype) * thought
    return output, stack.dropped + nn.functional.pad(mass, (step - 1, stack.dropped.shape[-1] - step))


def flush_stack(stack: Stack, done: Tensor | None, thought: Tensor, step: int) -> Stack:
    """Drop all remaining mass of the tokens that are done, a boolean [...], or of all if `None`."""
    if done is None:
        output, dropped = accumulate(stack, stack.pointer.sum(-1), thought, step)
        return Stack(torch.zeros_like(stack.pointer), stack.frames, output, dropped)
    output, dropped = accumulate(stack, stack.pointer.sum(-1) * done, thought, step)
    return Stack(stack.pointer * ~done.unsqueeze(-1), stack.frames, output, dropped)


def expected_steps(distribution: Tensor) -> Tensor:
    """Mean [...] of a distribution over halting steps [..., P]; the first step is step 1."""
    steps = torch.arange(1, distribution.shape[-1] + 1, device=distribution.device, dtype=distribution.dtype)
    return (distribution * steps).sum(-1)  # no product of matrices: autocast would round it


def divergence_from_geometric(distribution: Tensor, rate: float) -> Tensor:
    """KL [...] of a distribution over halting steps [..., P] from a geometric one, truncated at P: in nats.

    The regulariser of PonderNet (Banino et al. 2021, equation 6): it pulls towards halting with probability
    `rate` at every step, so it does not only charge for depth as the expected steps do, but also for too
    little of it.
    """
    steps = torch.arange(distribution.shape[-1], device=distribution.device, dtype=distribution.dtype)
    log_prior = (steps * math.log1p(-rate)).log_softmax(-1)
    return -entropy(distribution) - (distribution * log_prior).sum(-1)


def entropy(distribution: Tensor) -> Tensor:
    """Entropy [...] of a distribution [..., P], in nats."""
    # Where there is no mass the term is 0; the bound keeps its gradient finite.
    return -(distribution * distribution.clamp(min=torch.finfo(distribution.dtype).eps).log()).sum(-1)


__all__ = [
    "NO_OP",
    "POP",
    "PUSH",
    "Stack",
    "Transfer",
    "accumulate",
    "divergence_from_geometric",
    "entropy",
    "expected_steps",
    "flush_stack",
    "init_stack",
    "read_stack",
    "step_stack",
    "transfer_mass",
    "write_back",
]
