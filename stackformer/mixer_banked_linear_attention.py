# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Gated linear attention to a bank of decaying memories: the default token mixer of Stackformer.

Letters: n active tokens, B' rows, T' tokens of a row, d core width, H heads, K = V head size, S stack levels,
N memory banks, R = S * N memories of a head.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .configuration_stackformer import StackformerConfig
from .decoding_cpu import FEATURE_MAPS as DECODED_FEATURE_MAPS
from .decoding_cpu import decode_token
from .dtypes import at_least_float32
from .memory_bank import banked_linear_attention, combine_chunks, reverse_banked_linear_attention
from .mixer import BankWeights, Mixed
from .mixer_bank import BankMixer, ReadProjection, address_memories
from .state import State, StateSpec, TensorSpec
from .token_layout import TokenLayout


class _EluPlusOne(torch.autograd.Function):
    """elu(x) + 1. It keeps its result for the backward pass, as does what is given the result, and not x."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        result = nn.functional.elu(x).add_(1)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return grad * result.clamp(max=1)


def _elu_plus_one(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _EluPlusOne.apply(x)
    return nn.functional.elu(x).add_(1)


# Feature maps by name. All are non-negative, so that no normalizer vanishes between terms of both signs.
FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu_plus_one": _elu_plus_one,
    "relu": nn.functional.relu,
    "softplus": nn.functional.softplus,
    "softmax": lambda x: x.softmax(-1),
    "exp": lambda x: x.clamp(max=20.0).exp(),
}


class BankState(NamedTuple):
    """The state of [`BankedLinearAttention`], float32 at least."""

    memory: Tensor  # [B', H, R, K, V]
    normalizer: Tensor  # [B', H, R, K]
    past: Tensor  # [B', kernel - 1, 3 d], the last inputs of the convolution


class BankInputs(NamedTuple):
    """The inputs of the recurrence."""

    # From query to log decay, [B', T', H, ...] each: the first arguments of `banked_linear_attention`.
    operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    bank_weights: BankWeights
    past: Tensor  # [B', kernel - 1, 3 d], of the convolution, after these tokens


class BankedLinearAttention(BankMixer):
    """Linear attention to S*N memories per head, which add what is written to them."""

    state_type = BankState
    num_reversible = 2  # memory and normalizer; the past of the convolution is stored
    is_splittable = True

    def __init__(self, config: StackformerConfig):
        super().__init__(config)
        if self.num_banks > 1:
            self.read_proj = ReadProjection(config)
        self.feature_map_name = config.feature_map
        self.feature_map = FEATURE_MAPS[config.feature_map]

    def state_spec(self) -> StateSpec:
        """Specifies the memories, their key sums, and the last inputs of the convolution."""
        memories = (self.num_heads, self.num_memories, self.head_dim)
        return (
            TensorSpec("memory", (*memories, self.head_dim)),
            TensorSpec("normalizer", memories),
            self.past_spec,
        )

    def project(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: BankState | None
    ) -> BankInputs:
        """Computes the inputs of the recurrence. Of `state`, only `past` is read."""
        weights = self.route(hidden, pointer.dtype)
        addressed = (address_memories(pointer, weight) for weight in weights[:3])  # [n, H, R] each
        rows, read, write, log_decay = layout.to_rows(self.qkv_proj(hidden), *addressed)
        rows, past = self.convolve_heads(rows, None if state is None else state.past, layout)
        query, key, value = rows.unbind(2)  # [B', T', H, K] each
        query, key = self.feature_map(query), self.feature_map(key)
        if torch.is_grad_enabled():  # a view would keep the memory of all three until the backward pass
            value = value.contiguous()
        return BankInputs((query, key, value, read, write, log_decay), weights, past)

    def mix(
        self, hidden: Tensor, inputs: BankInputs, layout: TokenLayout, state: BankState | None
    ) -> tuple[Tensor, BankState, BankWeights]:
        """Writes each token to the memories and then reads them, in the order of the tokens."""
        mixed, (memory, normalizer) = banked_linear_attention(
            *inputs.operands,
            initial_state=None if state is None else (state.memory, state.normalizer),
            chunk_size=self.chunk_size,
            max_decay=self.max_decay_rate,
        )
        return (
            self.read_out(hidden, mixed, layout),
            BankState(memory, normalizer, inputs.past),
            inputs.bank_weights,
        )

    def decode_token(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout | None, state: BankState
    ) -> Mixed:
        """See [`BankMixer.decode_token`]."""
        weights = self.route(hidden, pointer.dtype)
        projected, gate = self.qkv_proj(hidden), self.gate_proj(hidden)
        mixed, new = decode_token(
            projected,
            self.conv.weight,
            pointer,
            weights[:3],
            self.norm.weight,
            gate,
            state,
            cast(float, self.norm.eps),
            feature_map=self.feature_map_name,
            rows=None if layout is None else layout.rows,
            in_place=layout is not None,
        )
        return self.o_proj(mixed), BankState(*new) if layout is None else state, weights

    def can_decode_token(self, hidden: Tensor, layout: TokenLayout) -> bool:
        """See [`BankMixer.can_decode_token`]. The library knows only some feature maps."""
        return self.feature_map_name in DECODED_FEATURE_MAPS and super().can_decode_token(hidden, layout)

    def total_decay(self, inputs: BankInputs) -> Tensor:
        """See [`Mixer.total_decay`]: [B', H, R]."""
        return -inputs.operands[-1].sum(1)

    def reverse(self, inputs: BankInputs, state: State) -> State:
        """See [`Mixer.reverse`]: memory and normalizer."""
        _, key, value, _, write, log_decay = inputs.operands
        return reverse_banked_linear_attention(key, value, write, log_decay, (state[0], state[1]))

    def carry(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, gather: Callable[..., list[Tensor]]
    ) -> tuple[BankState, BankInputs]:
        """See [`Mixer.carry`]."""
        history = self.kernel_size - 1
        rows = nn.functional.pad(layout.to_rows(hidden), (0, 0, history, 0))
        latest = self.qkv_proj(layout.last_of_rows(rows, history)).to(at_least_float32(hidden))
        counts = latest.new_full((len(rows),), layout.row_length)
        if layout.row_lengths is not None:
            counts = layout.row_lengths.to(latest.dtype)
        past = _last_of_parts(*gather(latest, counts))
        past_here = past if layout.rows is None else past.index_select(0, layout.rows)
        inputs = self.project(hidden, pointer, layout, BankState(None, None, past_here))  # type: ignore[arg-type]
        _, (memory, normalizer) = banked_linear_attention(
            *inputs.operands, chunk_size=self.chunk_size, max_decay=self.max_decay_rate
        )
        memory, normalizer = combine_chunks(*gather(-self.total_decay(inputs), memory, normalizer))
        return BankState(memory, normalizer, past), inputs


def _last_of_parts(latest: Tensor, counts: Tensor) -> Tensor:
    """Returns the last c entries [B, c, F] of a sequence that is split into P consecutive parts.

    Args:
        latest: [P, B, c, F], the last c entries of each part, right-aligned. A part that has fewer than c has
            zeros in front of them.
        counts: [P, B], the number of entries of each part. Numbers above c count as c.
    """
    size = latest.shape[2]
    real = torch.arange(size, device=latest.device) >= size - counts.unsqueeze(-1)  # [P, B, c]
    # [P, B, c] -> [B, P c], sorted so that real entries come last, in their order
    order = real.transpose(0, 1).flatten(1).int().argsort(dim=1, stable=True)
    order = order[:, order.shape[1] - size :].unsqueeze(-1).expand(-1, -1, latest.shape[3])  # [B, c, F]
    return latest.transpose(0, 1).flatten(1, 2).gather(1, order)
