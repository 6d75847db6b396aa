# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The differentiable processing stack of a token: its pointer, its frames, and its distribution over halting.

All functions are pure. The stack is a superposition stack (Joulin & Mikolov 2015, "Inferring Algorithmic
Patterns with Stack-Augmented Recurrent Nets", equations 1 to 5). Its frames are embeddings of one token. A
pop at the bottom level drops mass off the stack. The thoughts are accumulated, weighted by the mass dropped
at each step, as in Adaptive Computation Time (Graves 2016, equation 13).

Level 0 is the bottom. The pointer is a distribution over levels that loses mass as the token halts: the sum
of the pointer and of the dropped mass is always 1.

Letters: D hidden size, S stack levels, P ponder steps; "..." are any leading dimensions.
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
    output: Tensor  # [..., D], sum over steps of dropped mass * thought
    dropped: Tensor  # [..., P], mass dropped at each step; at the end, the distribution over halting steps


class Transfer(NamedTuple):
    """The mass that moves in one step, at each level [..., S], and the mass dropped off the bottom [...]."""

    kept: Tensor  # stays on its level
    from_below: Tensor  # arrives from the level below by a push
    from_above: Tensor  # arrives from the level above by a pop
    popped: Tensor  # leaves its level downwards by a pop
    dropped: Tensor  # leaves the stack: the mass popped at the bottom level


def init_stack(embedding: Tensor, depth: int, max_steps: int) -> Stack:
    """Returns a stack of S = `depth` levels for P = `max_steps` steps, with all mass on level 0.

    Every frame holds the token's embedding [..., D].
    """
    pointer = embedding.new_zeros(*embedding.shape[:-1], depth, dtype=at_least_float32(embedding))
    pointer[..., 0] = 1
    frames = embedding.unsqueeze(-2).expand(*embedding.shape[:-1], depth, embedding.shape[-1])
    dropped = pointer.new_zeros(*embedding.shape[:-1], max_steps)
    return Stack(pointer, frames, torch.zeros_like(embedding), dropped)


def read_stack(stack: Stack) -> Tensor:
    """Returns the superposition [..., D] of the frames E under the pointer p: sum_s p_s E_s / sum_s p_s."""
    mass = stack.pointer.sum(-1, keepdim=True)
    weights = stack.pointer / mass.clamp(min=torch.finfo(mass.dtype).tiny)  # 0 without mass
    # [..., 1, S] @ [..., S, D] -> [..., D]
    return (weights.to(stack.frames.dtype).unsqueeze(-2) @ stack.frames).squeeze(-2)


def transfer_mass(pointer: Tensor, actions: Tensor) -> Transfer:
    """Splits the mass of each level by the actions of the token. At the top level, a push keeps its mass.

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
    """Writes the thought of one step into the frames [..., S, D], weighted by the mass that moves.

    - No-op and push write the thought to the frame of the pointer.
    - A push also copies the thought to the level above (it calls a subroutine).
    - A pop adds the thought to the frame below and normalises the sum (it returns to the caller). The frame
      that it leaves is reset to the token's embedding.

    The weights of each new frame sum to at most 1, so the frames stay bounded.

    Args:
        frames: [..., S, D]; pointer: [..., S], before the step; transfer: of this step.
        thought: [..., D], the result of the core for the superposition.
        embedding: [..., D], the token's embedding.
        norm: normalises the sum of the caller's frame and the thought that returns to it.

    Returns:
        The new frames [..., S, D].
    """
    thought, embedding = thought.unsqueeze(-2), embedding.unsqueeze(-2)  # [..., 1, D]

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
    """Performs one ponder step: moves the mass, writes the thought, and accumulates the dropped mass.

    Args:
        stack: before the step; actions: [..., 3]; thought, embedding: [..., D]; step: from 1; norm: see
            `write_back`.
    """
    transfer = transfer_mass(stack.pointer, actions)
    frames = write_back(stack.frames, stack.pointer, transfer, thought, embedding, norm)
    output, dropped = accumulate(stack, transfer.dropped, thought, step)
    return Stack(transfer.kept + transfer.from_below + transfer.from_above, frames, output, dropped)


def accumulate(stack: Stack, mass: Tensor, thought: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Returns output and dropped mass after a step that drops `mass` [...] with the thought [..., D]."""
    mass = mass.unsqueeze(-1)
    output = stack.output + mass.to(thought.dtype) * thought
    return output, stack.dropped + nn.functional.pad(mass, (step - 1, stack.dropped.shape[-1] - step))


def flush_stack(stack: Stack, done: Tensor | None, thought: Tensor, step: int) -> Stack:
    """Drops all remaining mass of the tokens in `done`, a boolean [...]; of all tokens if it is `None`."""
    if done is None:
        output, dropped = accumulate(stack, stack.pointer.sum(-1), thought, step)
        return Stack(torch.zeros_like(stack.pointer), stack.frames, output, dropped)
    output, dropped = accumulate(stack, stack.pointer.sum(-1) * done, thought, step)
    return Stack(stack.pointer * ~done.unsqueeze(-1), stack.frames, output, dropped)


def expected_steps(distribution: Tensor) -> Tensor:
    """Returns the mean [...] of a distribution over halting steps [..., P]. The first step is step 1."""
    steps = torch.arange(1, distribution.shape[-1] + 1, device=distribution.device, dtype=distribution.dtype)
    return (distribution * steps).sum(-1)  # not a matrix product, which autocast would round


def divergence_from_geometric(distribution: Tensor, rate: float) -> Tensor:
    """Returns the KL divergence [...], in nats, of distributions over halting steps from a geometric prior.

    It is the regulariser of PonderNet (Banino et al. 2021, equation 6). The prior halts with probability
    `rate` at every step and is truncated at P. Unlike the expected number of steps, the divergence penalises
    too few steps as well as too many.

    Args:
        distribution: [..., P].
    """
    steps = torch.arange(distribution.shape[-1], device=distribution.device, dtype=distribution.dtype)
    log_prior = (steps * math.log1p(-rate)).log_softmax(-1)
    return -entropy(distribution) - (distribution * log_prior).sum(-1)


def entropy(distribution: Tensor) -> Tensor:
    """Returns the entropy [...] of a distribution [..., P], in nats."""
    # Steps without mass contribute 0. The bound keeps their gradients finite.
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
