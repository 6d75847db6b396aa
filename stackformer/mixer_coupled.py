# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The coupled cell as a token mixer: a recurrence that loses no information, so that it can be reversed.

It is a reversible coupling (Gomez et al. 2017, "The Reversible Residual Network", equations 6 to 8) along
time instead of depth. Two states are updated in turn, each from the other:

    s1 <- s1 + f1(s2, x)          s2 <- s2 + f2(s1, x)

    f(s, x) = sigmoid(a) * tanh(b),   [a, b] = W norm(s) + U x

To go back, the updates are subtracted in the opposite order. Floating-point sums cannot be undone exactly,
but fixed-point sums can (MacKay et al. 2018, "Reversible Recurrent Neural Networks", section 3.2). So f is
rounded to a multiple of 2 ** -`fraction_bits`, and its gradient ignores the rounding. The states are
fixed-point numbers stored as float64, which adds and subtracts integers of up to 53 bits exactly. Because
|f| < 1, this holds for 2 ** 33 tokens. Unlike integers, float64 states take a gradient, in caches as well.

Each update depends on the states before, so tokens are computed one after another. Unlike attention, the cell
can track state. In training, only its inputs and the last state are kept, see `_ReversibleScan`. The stack
pointer is not used.

There are two forms. In [`Coupled`], states grow with the number of tokens T and are read normalised, so the
effect of one token fades as 1 / T. In [`CoupledAngles`], states are angles: they wrap around, and are read by
cosine and sine. The effect of a token does not fade, and the number of tokens has no limit:

    s1 <- s1 + f1(s2, x) modulo 1         s2 <- s2 + f2(s1, x) modulo 1

    f(s, x) = clip(1/2 + a/3, 0, 1) * clip(b, -1, 1) / 2,   [a, b] = W [cos 2 pi s ; sin 2 pi s] + U x

Letters: B' rows, T' time, d core width, m size of each state, n active tokens.
"""

import math
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

# The term U x [B', 2 m] of one token for one state, and whether the slot holds a token [B', 1]; None: all do.
Drive = tuple[Tensor, Tensor | None]
# Rows [B', T', d], and whether each slot [B', T', 1] holds a token; None: all do.
Rows = tuple[Tensor, Tensor | None]

FRACTION_BITS = 20  # about the precision of f in float32
ANGLE_BITS = 30  # of [`CoupledAngles`]; more than f in float32 has, so that the rounding adds no error
DEFAULT_CHUNK_SIZE = 64


class CoupledState(NamedTuple):
    """The state of [`Coupled`]."""

    # [B', 2, m], both states, fixed-point numbers in float64; for [`CoupledAngles`], in turns
    states: Tensor


class Coupled(Mixer):
    """Two states that update each other, and a gated projection of both.

    A subclass may read states otherwise than normalised (`read`, `num_features`), limit updates otherwise
    (`squash`), and wrap states around (`wrap`).
    """

    state_type = CoupledState
    num_reversible = 1
    reverses_exactly = True
    fraction_bits = FRACTION_BITS
    num_features = 1  # for each number of a state, see `read`

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size, state_size = config.core_size, config.coupled_state_size
        self.state_size = state_size
        self.eps = config.rms_norm_eps
        self.chunk_size = config.chunk_size or DEFAULT_CHUNK_SIZE
        read_size = self.num_features * state_size
        self.in_proj = nn.Linear(size, 4 * state_size)
        self.first_proj = nn.Linear(read_size, 2 * state_size, bias=False)
        self.second_proj = nn.Linear(read_size, 2 * state_size, bias=False)
        self.gate_proj = nn.Linear(size, 2 * read_size, bias=False)
        self.norm = RMSNorm(2 * read_size, eps=config.rms_norm_eps)
        self.o_proj = ResidualProjection(2 * read_size, size)

    def state_spec(self) -> StateSpec:
        """Specifies both states, which are fixed-point numbers stored as float64."""
        return (TensorSpec("states", (2, self.state_size)),)

    def project(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: CoupledState | None
    ) -> Rows:
        """Returns the tokens as rows. The pointer is not used."""
        return layout.to_rows(hidden), _real_slots(layout)

    def mix(
        self, hidden: Tensor, inputs: Rows, layout: TokenLayout, state: CoupledState | None
    ) -> tuple[Tensor, CoupledState, None]:
        """Runs the recurrence over the tokens. Both states are zeros at the beginning of a row."""
        rows, real = inputs
        if state is None:
            start = hidden.new_zeros(layout.num_rows, 2, self.state_size, dtype=torch.float64)
        else:
            start = state.states
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        # Compiled code decides itself which activations it keeps and which it computes again.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            mixed, end = _ReversibleScan.apply(self, real, rows, start, *parameters)
        else:
            mixed, end = self.scan(rows, real, start)
        return layout.to_tokens(mixed), CoupledState(end), None

    def total_decay(self, inputs: Rows) -> Tensor:
        """See [`Mixer.total_decay`]: zeros [B', 2], because nothing decays."""
        return inputs[0].new_zeros(len(inputs[0]), 2)

    def reverse(self, inputs: Rows, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See [`Mixer.reverse`]. It is exact in the same batch, where f is rounded in the same way."""
        (end,) = state
        for chunk in reversed(self.chunks(*inputs)):
            end = self.reverse_chunk(*chunk, end)
        return (end,)

    def read(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns one state [B', m] as an update of the other sees it: normalised."""
        return nn.functional.rms_norm(state.to(dtype), state.shape[-1:], eps=self.eps)

    def read_both(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns both states [B', C, 2 m] as the tokens see them, before `norm`."""
        return states.to(dtype)

    def squash(self, gate: Tensor, value: Tensor) -> Tensor:
        """Returns f [B', m] of a [B', m] and b [B', m], the gate and the value."""
        return gate.sigmoid() * value.tanh()

    def wrap(self, state: Tensor) -> Tensor:
        """Returns a state [B', m] after an update or its reversal. It does not wrap around here."""
        return state

    def chunks(self, rows: Tensor, real: Tensor | None) -> list[Rows]:
        """Splits rows [B', T', d] and `real` [B', T', 1] into chunks along time."""
        parts = rows.split(self.chunk_size, dim=1)
        reals = [None] * len(parts) if real is None else real.split(self.chunk_size, dim=1)
        return list(zip(parts, reals, strict=True))

    def scan(self, rows: Tensor, real: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the recurrence over rows [B', T', d] from a state [B', 2, m].

        Returns:
            The mixed rows [B', T', d], and the state after them.
        """
        mixed = []
        for chunk in self.chunks(rows, real):
            part, state = self.advance_chunk(*chunk, state)
            mixed.append(part)
        return torch.cat(mixed, dim=1), state

    def advance_chunk(self, rows: Tensor, real: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """`scan` for one chunk [B', C, d]. `real` [B', C, 1] marks slots that hold tokens; `None`: all."""
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.to(self.norm.weight.dtype)
            first, second = state.unbind(1)  # [B', m] each
            states = []
            for to_first, to_second in self._drives(rows, real):
                first = self.wrap(first + self._update(self.first_proj, second, *to_first))
                second = self.wrap(second + self._update(self.second_proj, first, *to_second))
                states.append(torch.cat([first, second], dim=1))
            # [B', C, 2 m] -> [B', C, 2 m num_features]
            both = self.norm(self.read_both(torch.stack(states, dim=1), rows.dtype))
            mixed = self.o_proj(swish_gate(self.gate_proj(rows), both))
        return mixed, torch.stack([first, second], dim=1)

    def reverse_chunk(self, rows: Tensor, real: Tensor | None, state: Tensor) -> Tensor:
        """Computes the state [B', 2, m] before one chunk from the state after it."""
        with torch.autocast(rows.device.type, enabled=False):
            first, second = state.unbind(1)  # [B', m] each
            for to_first, to_second in reversed(self._drives(rows.to(self.norm.weight.dtype), real)):
                second = self.wrap(second - self._update(self.second_proj, first, *to_second))
                first = self.wrap(first - self._update(self.first_proj, second, *to_first))
        return torch.stack([first, second], dim=1)

    def _drives(self, rows: Tensor, real: Tensor | None) -> list[tuple[Drive, Drive]]:
        """Returns for each slot of a chunk [B', C, d] the terms U x [B', 2 m] of both states."""
        reals = [None] * rows.shape[1] if real is None else real.to(rows.dtype).unbind(1)
        # [B', C, 4 m] -> [B', C, 2, 2 m] -> C times [B', 2, 2 m]
        drives = self.in_proj(rows).unflatten(-1, (2, -1)).unbind(1)
        return [
            ((drive[:, 0], is_real), (drive[:, 1], is_real))
            for drive, is_real in zip(drives, reals, strict=True)
        ]

    def _update(self, proj: nn.Linear, source: Tensor, drive: Tensor, real: Tensor | None) -> Tensor:
        """Computes f [B', m], the update of one state from the other state `source` [B', m] and a token."""
        gate, value = (proj(self.read(source, drive.dtype)) + drive).chunk(2, dim=-1)  # [B', m] each
        update = self.squash(gate, value)
        return _FixedPoint.apply(update if real is None else update * real, self.fraction_bits)


class CoupledAngles(Coupled):
    """The coupled cell with angles for states, in turns: at least -1/2, and less than 1/2.

    A token turns an angle by up to half a turn either way, so any angle leads to any other. Sigmoid and tanh
    are piecewise linear here. So no turn and half a turn, which parity needs, are reached exactly, and no
    error adds up over the tokens. At first, the states do not depend on each other. Then an angle is a sum
    over the tokens, whose gradients neither vanish nor explode. Training may let them depend on each other so
    strongly that small changes grow with time.
    """

    fraction_bits = ANGLE_BITS
    num_features = 2  # cosine and sine

    def __init__(self, config: StackformerConfig):
        super().__init__(config)
        read_size = self.num_features * self.state_size
        self.first_proj = ResidualProjection(read_size, 2 * self.state_size)
        self.second_proj = ResidualProjection(read_size, 2 * self.state_size)

    def read(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the cosines and sines [..., 2 m] of angles [..., m]."""
        radians = 2 * math.pi * state.to(torch.promote_types(dtype, torch.float32))
        return torch.cat([radians.cos(), radians.sin()], dim=-1).to(dtype)

    def squash(self, gate: Tensor, value: Tensor) -> Tensor:
        """Returns f [B', m], in turns: 0 from a = -3/2 down, and 1/2 from a = 3/2 and b = 1 up."""
        return 0.5 * (0.5 + gate / 3).clamp(0, 1) * value.clamp(-1, 1)

    def read_both(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the cosines and sines [B', C, 4 m] of both states [B', C, 2 m]."""
        return self.read(states, dtype)

    def wrap(self, state: Tensor) -> Tensor:
        """Returns angles modulo one turn. This is exact for fixed-point numbers, and its gradient is 1."""
        return state - (state + 0.5).detach().floor()


class _FixedPoint(torch.autograd.Function):
    """Rounds to a multiple of 2 ** -bits, as float64. The gradient ignores the rounding."""

    @staticmethod
    def forward(ctx, x: Tensor, bits: int) -> Tensor:
        ctx.dtype = x.dtype
        return (x.double() * 2.0**bits).round() * 2.0**-bits

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.to(ctx.dtype), None


class _ReversibleScan(torch.autograd.Function):
    """`Coupled.scan` that keeps only its inputs and the last state for the backward pass.

    The backward pass goes through the chunks from the last to the first. For each, it reverses the state to
    the start of the chunk, runs the chunk again with a graph, and backpropagates through it. Both passes
    together run the recurrence three times, besides the gradients.
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
            state = mixer.reverse_chunk(chunk, real, state)
            with torch.enable_grad():
                leaves = [chunk.detach().requires_grad_(), state.detach().requires_grad_(), *parameters]
                results = mixer.advance_chunk(leaves[0], real, leaves[1])
            grad_chunk, grad_state, *grads = torch.autograd.grad(results, leaves, [grad, grad_state])
            grad_rows.append(grad_chunk)
            for total, part in zip(grad_parameters, grads, strict=True):
                total += part
        return None, None, torch.cat(grad_rows[::-1], dim=1), grad_state, *grad_parameters


def _real_slots(layout: TokenLayout) -> Tensor | None:
    """Marks the slots [B', T', 1] of the rows that hold tokens; `None` if all do."""
    if layout.row_lengths is None:
        return None
    slots = torch.arange(layout.row_length, device=layout.row_lengths.device)
    return (slots < layout.row_lengths.unsqueeze(1)).unsqueeze(-1)


__all__ = ["Coupled", "CoupledAngles"]
