# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Titans: a memory that is a small network, trained by gradient descent while it reads.

Behrouz et al. 2024, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663). Per head, a network M of
`memory_depth` layers, M(x) = W_L silu(W_(L-1) ... silu(W_1 x)), learns to map keys to values (equations 12 to
15), and is read after it was written to:

    g_t = gradient of |M(k_t) - v_t|^2, as a whole clipped to norm 1       surprise
    S_t = eta_t S_(t-1) - theta_t g_t                                      momentum
    W_t = (1 - alpha_t) W_(t-1) + S_t                                      forgetting
    y_t = M_t(q_t)

As in equations 16 to 18, gradients are taken at the weights at the start of a chunk, so that a chunk is a few
products of matrices. Here chunks are part of the definition: they are counted from the first token of a row,
the state knows the position inside the chunk, and any split of a text gives the same result. No weights of
single tokens are ever formed: within a chunk, W_t is a combination of the weights and the momentum at its
beginning and of the outer products that the gradients are.

The clipped gradient and the bounded step keep the memory finite whatever is read: the norm of the momentum is
at most theta / (1 - eta), and that of the weights at most this over alpha.

Letters: B' rows, T' tokens of a row, H heads, K head size, L layers of the memory, C tokens of a chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration_stackformer import StackformerConfig
from .layers_stackformer import ResidualProjection, ShortConvolution
from .memory_bank import at_least_float32
from .mixer_attention import Attention
from .processing_stack import TokenLayout

# Logit of the share that is forgotten with every token at first, 1 %: at 50 % nothing is ever learned.
_INITIAL_FORGETTING = -4.6
# exp(-30) is nothing in float32, and sums of larger logarithms would lose the digits of smaller ones.
_LEAST_LOGARITHM = -30.0


class Memory(NamedTuple):
    """Weights of the memory network, [B', L, H, K, K] each (output, input)."""

    anchor: Tensor  # at the start of the chunk, where gradients are taken
    weights: Tensor  # now
    momentum: Tensor


class Writes(NamedTuple):
    """The gates of tokens [B', H, C]. An empty slot has `real` 0, logarithms 0 and step 0: it changes
    nothing."""

    log_keep: Tensor  # log(1 - alpha)
    log_momentum: Tensor  # log eta
    step: Tensor  # theta
    real: Tensor  # 1 for a token, 0 for an empty slot


def measure_surprise(weights: Tensor, key: Tensor, value: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of |M(key) - value|^2 for every token alone, as outer products of two vectors for each layer.

    Args:
        weights: [B', L, H, K, K]; key, value: [B', H, C, K].

    Returns:
        For each layer what it read and the gradient at its output, [B', H, C, K] each. The latter is scaled
        so that the norm of a token's whole gradient, over all layers of a head, is at most 1.
    """
    layers = weights.unbind(1)
    inputs, slopes = [key], []
    for weight in layers[:-1]:
        before = inputs[-1] @ weight.mT
        gate = before.sigmoid()
        slopes.append(gate * (1 + before * (1 - gate)))
        inputs.append(before * gate)
    errors = [2 * (inputs[-1] @ layers[-1].mT - value)]
    for weight, slope in zip(layers[:0:-1], slopes[::-1], strict=True):
        errors.insert(0, (errors[0] @ weight) * slope)
    squares = [x.square().sum(-1) * e.square().sum(-1) for x, e in zip(inputs, errors, strict=True)]
    clip = torch.stack(squares).sum(0).clamp(min=1).rsqrt().unsqueeze(-1)
    return inputs, [error * clip for error in errors]


def advance_memory(
    memory: Memory, query: Tensor, key: Tensor, value: Tensor, writes: Writes
) -> tuple[Tensor, Memory]:
    """Write C tokens of one chunk and read after each: [B', H, C, K] and the memory after the last.

    With cumulated products a of 1 - alpha and c of eta, W_t = a_t W + f_t S - sum_(j<=t) G_tj g_j, where
    f_t = sum_(i<=t) (a_t / a_i) c_i and G_tj = theta_j sum_(j<=i<=t) (a_t / a_i) (c_i / c_j).

    Args:
        memory: before these tokens; its anchor is left as it is.
        query, key, value: [B', H, C, K].
    """
    keep, momentum = _cumulated(writes.log_keep), _cumulated(writes.log_momentum)
    step = writes.step.unsqueeze(-2)
    keep_start = writes.log_keep.cumsum(-1).exp().unsqueeze(-1)
    momentum_start = writes.log_momentum.cumsum(-1).exp().unsqueeze(-1)
    taken = keep * writes.real.unsqueeze(-2)
    from_momentum = taken @ momentum_start
    on_weights, on_momentum = (taken @ momentum) * step, momentum[..., -1:, :] * step

    inputs, errors = measure_surprise(memory.anchor, key, value)
    read, weights, momenta = query, [], []
    layers = zip(memory.weights.unbind(1), memory.momentum.unbind(1), inputs, errors, strict=True)
    for number, (weight, velocity, x, error) in enumerate(layers):
        if number > 0:
            read = nn.functional.silu(read)
        read = (
            keep_start * (read @ weight.mT)
            + from_momentum * (read @ velocity.mT)
            - ((read @ x.mT) * on_weights) @ error
        )
        weights.append(
            keep_start[..., -1:, :] * weight
            + from_momentum[..., -1:, :] * velocity
            - (error * on_weights[..., -1, :].unsqueeze(-1)).mT @ x
        )
        momenta.append(
            momentum_start[..., -1:, :] * velocity - (error * on_momentum[..., -1, :].unsqueeze(-1)).mT @ x
        )
    return read, Memory(memory.anchor, torch.stack(weights, dim=1), torch.stack(momenta, dim=1))


def _cumulated(logarithms: Tensor) -> Tensor:
    """Of logarithms [..., C] the products over j < k <= i [..., C (i), C (j)], 0 for j > i."""
    total = logarithms.cumsum(-1)
    future = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()


class NeuralMemory(nn.Module):
    """The memory with its projections: what both ways to use it have in common.

    Equations 11 to 15, with a short convolution, SiLU and keys and queries of length 1 (section 4.4). theta,
    eta and alpha are sigmoids, theta times `memory_max_step_size`. The weights before the first token are
    learned, and stand for what persistent tokens in front of the memory would write.
    """

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.num_heads = config.num_attention_heads
        self.head_dim = size // self.num_heads
        self.chunk_size = config.memory_chunk_size
        self.max_step_size = config.memory_max_step_size
        self.qkv_proj = nn.Linear(size, 3 * size, bias=False)
        self.conv = ShortConvolution(3 * size, config.conv_kernel_size)
        self.write_proj = nn.Linear(size, 3 * self.num_heads)
        self.initial_memory = nn.Parameter(
            torch.empty(config.memory_depth, self.num_heads, self.head_dim, self.head_dim)
        )
        self.norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, layout: TokenLayout, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Write and read the active tokens along time.

        Args:
            hidden: [n, d], normalised; layout: of the n tokens.
            state: the memory's anchor, weights (both less the learned initial ones) and momentum, [B', L, H,
                K, K] each, float32; the position in the chunk [B']; the last inputs of the convolution [B',
                kernel - 1, 3 d]. `None`, or zeros, for the beginning of a row.

        Returns:
            What was read, normalised per head, [n, d], and the new state.
        """
        dtype = at_least_float32(hidden)
        projected = layout.to_rows(self.qkv_proj(hidden))
        rows, past = self.conv.slide(projected, None if state is None else state[4], layout)
        rows = nn.functional.silu(rows.to(dtype)).unflatten(-1, (3, self.num_heads, self.head_dim))
        gates = layout.to_rows(self.write_proj(hidden).to(dtype).unflatten(-1, (3, self.num_heads)))

        initial = self.initial_memory.to(dtype)
        if state is None:
            zeros = torch.zeros_like(initial).expand(len(rows), -1, -1, -1, -1)
            position = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
            state = (zeros, zeros, zeros, position)
            offset = 0
        else:
            offset = self.chunk_size - 1  # at most, since a row's own is not known without waiting for it
        memory = Memory(state[0] + initial, state[1] + initial, state[2])
        with torch.autocast(hidden.device.type, enabled=False):
            mixed, memory, position = self._advance(rows, gates, memory, state[3], offset, layout)
        mixed = self.norm(layout.to_tokens(mixed).to(projected.dtype)).flatten(1)
        changes = (memory.anchor - initial, memory.weights - initial, memory.momentum)
        return mixed, (*changes, position, past)

    def _advance(
        self, rows: Tensor, gates: Tensor, memory: Memory, position: Tensor, offset: int, layout: TokenLayout
    ) -> tuple[Tensor, Memory, Tensor]:
        """Rows [B', T', 3, H, K] whose first tokens have `position` [B'] in their chunk, at most `offset`."""
        length = rows.shape[1]
        width = 1 if length == 1 else self.chunk_size
        count = 1 if length == 1 else -(-(length + offset) // width)
        # Chunks of all rows side by side: a row that starts inside of one leaves the slots before it empty.
        lengths = torch.full_like(position, length) if layout.row_lengths is None else layout.row_lengths
        start = torch.zeros_like(position) if length == 1 else position
        slots = torch.arange(count * width, device=rows.device) - start.unsqueeze(1)
        real = (slots >= 0) & (slots < lengths.unsqueeze(1))
        slots = slots.clamp(0, length - 1)

        def chunks(tokens: Tensor) -> tuple[Tensor, ...]:
            """[B', T', G, H, ...] to `count` times [B', G, H, C, ...]."""
            aligned = _take(tokens, slots).unflatten(1, (count, width))
            return aligned.movedim(2, 4).unbind(1)

        writes = self._writes(gates)
        mixed = []
        total = position + lengths
        for number, (qkv, gate, here) in enumerate(
            zip(chunks(rows), chunks(writes), real.unflatten(1, (count, width)).unbind(1), strict=True)
        ):
            here = here.unsqueeze(1)
            log_keep, log_momentum, step = (gate * here.unsqueeze(1)).unbind(1)
            chunk = Writes(log_keep, log_momentum, step, here.to(gate.dtype))
            query, key, value = qkv.unbind(1)
            query, key = nn.functional.normalize(query, dim=-1), nn.functional.normalize(key, dim=-1)
            read, memory = advance_memory(memory, query, key, value, chunk)
            complete = (total >= (number + 1) * self.chunk_size).view(-1, 1, 1, 1, 1)
            memory = memory._replace(anchor=torch.where(complete, memory.weights, memory.anchor))
            mixed.append(read.transpose(1, 2))
        index = torch.arange(length, device=rows.device) + start.unsqueeze(1)
        return _take(torch.cat(mixed, dim=1), index), memory, total % self.chunk_size

    def _writes(self, gates: Tensor) -> Tensor:
        """Logits [B', T', 3, H] to log(1 - alpha), log eta and theta."""
        forget, momentum, step = gates.unbind(2)
        log_keep = nn.functional.logsigmoid(-forget - _INITIAL_FORGETTING).clamp(min=_LEAST_LOGARITHM)
        log_momentum = nn.functional.logsigmoid(momentum).clamp(min=_LEAST_LOGARITHM)
        return torch.stack([log_keep, log_momentum, self.max_step_size * step.sigmoid()], dim=2)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Entries `index` [B', M] of each row of `rows` [B', T', ...]: [B', M, ...]."""
    index = index.view(*index.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])
    return rows.gather(1, index)


class MemoryAsLayer(nn.Module):
    """The neural memory as a mixer. Layers of it and of softmax attention are the paper's memory as a layer
    (equations 29 to 31)."""

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.memory = NeuralMemory(config)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.o_proj = ResidualProjection(size, size)

    def forward(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...], None]:
        """Mix the active tokens [n, d] along time, whatever their pointer. See `NeuralMemory.forward`."""
        mixed, state = self.memory(hidden, layout, state)
        return self.o_proj(nn.functional.silu(self.gate_proj(hidden)) * mixed), state, None


class MemoryAsGate(nn.Module):
    """Softmax attention, and the neural memory times it (equations 26 to 28).

    Both are normalised with learned weights; which passes through the nonlinearity, the paper does not say.
    Here attention does, in the place of the linear gate of `MemoryAsLayer`.
    """

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.attention = Attention(config)
        self.attention.o_proj = nn.Identity()  # type: ignore[assignment]  # projected after the product
        self.attention_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.memory = NeuralMemory(config)
        self.o_proj = ResidualProjection(size, size)

    def forward(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...], None]:
        """Mix the active tokens [n, d] along time. The state is attention's three tensors, then the
        memory's."""
        past, remembered = (None, None) if state is None else (state[:3], state[3:])
        attended, past, _ = self.attention(hidden, pointer, layout, past)
        mixed, remembered = self.memory(hidden, layout, remembered)
        output = self.o_proj(nn.functional.silu(self.attention_norm(attended)) * mixed)
        return output, (*past, *remembered), None


__all__ = ["MemoryAsGate", "MemoryAsLayer", "NeuralMemory"]
