# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The coupled cell as a token mixer: a recurrence that forgets nothing, so that it can be run backwards.

Reversible coupling (Gomez et al. 2017, "The Reversible Residual Network", equations 6 to 8) along time in
place of depth. Two states take turns in writing to each other:

    s1 <- s1 + f1(s2, x)          s2 <- s2 + f2(s1, x)

    f(s, x) = sigmoid(a) * tanh(b),   [a, b] = W norm(s) + U x

and are subtracted from in the opposite order to go back. In floating-point numbers a sum cannot be taken back
exactly; in fixed-point numbers it can (MacKay et al. 2018, "Reversible Recurrent Neural Networks", section
3.2). So f is rounded to a multiple of 2 ** -FRACTION_BITS, with the gradient of what was not rounded. The
states are fixed-point numbers, too, but are held by float64, which adds and subtracts integers of up to 53
bits exactly: for all tokens that anybody can read, since |f| < 1. Unlike integers, they take a gradient, in
caches as well.

What is written depends on what was written before, so tokens are computed one after the other; unlike
attention, the cell can track state. In training, only its inputs and the last state are kept; see
`_ReversibleScan`. The stack pointer addresses no memories here, so it is ignored.

Letters: B' rows, T' time, d core width, m size of each state, n active tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .configuration_stackformer import StackformerConfig
from .fused_ops import RMSNorm, swish_gate
from .layers_stackformer import ResidualProjection
from .mixer import Mixer
from .state import StateSpec, TensorSpec
from .token_layout import TokenLayout

# A token's part of what is written to a state [B', 2 m], and whether it is one [B', 1], if not all are.
Drive = tuple[Tensor, Tensor | None]
# Tokens [B', T', d], and which slots [B', T', 1] hold one, if not all do.
Rows = tuple[Tensor, Tensor | None]

FRACTION_BITS = 20  # float32's f is good to about as many
DEFAULT_CHUNK_SIZE = 64


class CoupledState(NamedTuple):
    """The state of [`Coupled`]."""

    states: Tensor  # [B', 2, m], both states, fixed-point numbers in float64


class Coupled(Mixer):
    """Two states that write to each other, and a gated read of both."""

    state_type = CoupledState
    num_reversible = 1
    reverses_exactly = True

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size, state_size = config.core_size, config.coupled_state_size
        self.state_size = state_size
        self.eps = config.rms_norm_eps
        self.chunk_size = config.chunk_size or DEFAULT_CHUNK_SIZE
        self.in_proj = nn.Linear(size, 4 * state_size)
        self.first_proj = nn.Linear(state_size, 2 * state_size, bias=False)
        self.second_proj = nn.Linear(state_size, 2 * state_size, bias=False)
        self.gate_proj = nn.Linear(size, 2 * state_size, bias=False)
        self.norm = RMSNorm(2 * state_size, eps=config.rms_norm_eps)
        self.o_proj = ResidualProjection(2 * state_size, size)

    def state_spec(self) -> StateSpec:
        """Both states, as fixed-point numbers that float64 holds."""
        return (TensorSpec("states", (2, self.state_size)),)

    def project(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: CoupledState | None
    ) -> Rows:
        """The tokens as rows."""
        return layout.to_rows(hidden), _real_slots(layout)

    def mix(
        self, hidden: Tensor, inputs: Rows, layout: TokenLayout, state: CoupledState | None
    ) -> tuple[Tensor, CoupledState, None]:
        """Read the tokens one after the other, from states that are zeros at the beginning."""
        rows, real = inputs
        if state is None:
            start = hidden.new_zeros(layout.num_rows, 2, self.state_size, dtype=torch.float64)
        else:
            start = state.states
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        # A compiler keeps, or computes again, what it likes.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            mixed, end = _ReversibleScan.apply(self, real, rows, start, *parameters)
        else:
            mixed, end = self.scan(rows, real, start)
        return layout.to_tokens(mixed), CoupledState(end), None

    def total_decay(self, inputs: Rows) -> Tensor:
        """See [`Mixer.total_decay`]: [B', 2], none."""
        return inputs[0].new_zeros(len(inputs[0]), 2)

    def reverse(self, inputs: Rows, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The state before the tokens, from the one after them: every bit of it, in the same batch, where f
        rounds as it did."""
        (end,) = state
        for chunk in reversed(self.chunks(*inputs)):
            end = self.unread(*chunk, end)
        return (end,)

    def chunks(self, rows: Tensor, real: Tensor | None) -> list[Rows]:
        """Rows [B', T', d] and what is real of them, chunk by chunk."""
        parts = rows.split(self.chunk_size, dim=1)
        reals = [None] * len(parts) if real is None else real.split(self.chunk_size, dim=1)
        return list(zip(parts, reals, strict=True))

    def scan(self, rows: Tensor, real: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """Read all rows [B', T', d]: mixed rows [B', T', d], and the state after them."""
        mixed = []
        for chunk in self.chunks(rows, real):
            part, state = self.read(*chunk, state)
            mixed.append(part)
        return torch.cat(mixed, dim=1), state

    def read(self, rows: Tensor, real: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """Read one chunk [B', C, d] of which only `real` [B', C, 1] slots are tokens, if not all are."""
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.to(self.norm.weight.dtype)
            first, second = state.unbind(1)
            states = []
            for to_first, to_second in self._drives(rows, real):
                first = first + self._written(self.first_proj, second, *to_first)
                second = second + self._written(self.second_proj, first, *to_second)
                states.append(torch.cat([first, second], dim=1))
            read = self.norm(torch.stack(states, dim=1).to(rows.dtype))
            mixed = self.o_proj(swish_gate(self.gate_proj(rows), read))
        return mixed, torch.stack([first, second], dim=1)

    def unread(self, rows: Tensor, real: Tensor | None, state: Tensor) -> Tensor:
        """The state [B', 2, m] before one chunk, from the one after it."""
        with torch.autocast(rows.device.type, enabled=False):
            first, second = state.unbind(1)
            for to_first, to_second in reversed(self._drives(rows.to(self.norm.weight.dtype), real)):
                second = second - self._written(self.second_proj, first, *to_second)
                first = first - self._written(self.first_proj, second, *to_first)
        return torch.stack([first, second], dim=1)

    def _drives(self, rows: Tensor, real: Tensor | None) -> list[tuple[Drive, Drive]]:
        """For each slot of a chunk, the token's part [B', 2 m] of what is written to either state."""
        reals = [None] * rows.shape[1] if real is None else real.to(rows.dtype).unbind(1)
        drives = self.in_proj(rows).unflatten(-1, (2, -1)).unbind(1)
        return [
            ((drive[:, 0], is_real), (drive[:, 1], is_real))
            for drive, is_real in zip(drives, reals, strict=True)
        ]

    def _written(self, proj: nn.Linear, source: Tensor, drive: Tensor, real: Tensor | None) -> Tensor:
        """What the state `source` [B', m] and a token write to the other state: fixed-point numbers."""
        normed = nn.functional.rms_norm(source.to(drive.dtype), source.shape[-1:], eps=self.eps)
        gate, value = (proj(normed) + drive).chunk(2, dim=-1)
        written = gate.sigmoid() * value.tanh()
        return _FixedPoint.apply(written if real is None else written * real)


class _FixedPoint(torch.autograd.Function):
    """Round to a multiple of 2 ** -FRACTION_BITS, held by float64; the gradient goes straight through."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return (x.double() * 2.0**FRACTION_BITS).round() * 2.0**-FRACTION_BITS

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.to(ctx.dtype)


class _ReversibleScan(torch.autograd.Function):
    """`Coupled.scan` that keeps its inputs and the state after them, whatever was read.

    The backward pass goes from chunk to chunk: it takes the state back to the chunk's start, reads the chunk
    again with a graph, and propagates through that. It costs three forward passes beside the gradients'.
    """

    @staticmethod
    def forward(
        ctx, mixer: Coupled, real: Tensor | None, rows: Tensor, state: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        mixed, end = mixer.scan(rows, real, state)
        ctx.mixer, ctx.real = mixer, real
        ctx.save_for_backward(rows, end, *parameters)
        return mixed, end

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mixed: Tensor, grad_state: Tensor):
        rows, state, *parameters = ctx.saved_tensors
        mixer, size = ctx.mixer, ctx.mixer.chunk_size
        grad_rows, grad_parameters = [], [torch.zeros_like(parameter) for parameter in parameters]
        chunks = zip(mixer.chunks(rows, ctx.real), grad_mixed.split(size, dim=1), strict=True)
        for (chunk, real), grad in reversed(list(chunks)):
            state = mixer.unread(chunk, real, state)
            with torch.enable_grad():
                leaves = [chunk.detach().requires_grad_(), state.detach().requires_grad_(), *parameters]
                results = mixer.read(leaves[0], real, leaves[1])
            grad_chunk, grad_state, *grads = torch.autograd.grad(results, leaves, [grad, grad_state])
            grad_rows.append(grad_chunk)
            for total, part in zip(grad_parameters, grads, strict=True):
                total += part
        return None, None, torch.cat(grad_rows[::-1], dim=1), grad_state, *grad_parameters


def _real_slots(layout: TokenLayout) -> Tensor | None:
    """Which slots [B', T', 1] of the rows hold tokens; `None` if all do."""
    if layout.row_lengths is None:
        return None
    slots = torch.arange(layout.row_length, device=layout.row_lengths.device)
    return (slots < layout.row_lengths.unsqueeze(1)).unsqueeze(-1)


__all__ = ["Coupled"]
