# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The delta rule on a bank of memories as a token mixer: each token corrects what the bank holds for its key.

delta_bank.py has the operator and its sources. With one bank, one level and unit decay, this is the delta
rule of DeltaNet; with decay, of Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464).

Letters: n active tokens, B' rows, T' tokens of a row, d core width, H heads, K = V head size, S stack levels,
N memory banks, R = S * N memories of a head.
"""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .configuration_stackformer import StackformerConfig
from .decoding_cpu import decode_token
from .delta_bank import banked_delta_rule
from .dtypes import at_least_float32
from .fused_ops import unit_length
from .mixer import BankWeights, Mixed
from .mixer_bank import BankMixer, address_memories
from .state import StateSpec, TensorSpec
from .token_layout import TokenLayout


class DeltaBankState(NamedTuple):
    """The state of [`BankedDeltaRule`], float32 at least."""

    memory: Tensor  # [B', H, R, K, V]
    past: Tensor  # [B', kernel - 1, 3 d], the last inputs of the convolution


class DeltaBankInputs(NamedTuple):
    """The inputs of the recurrence."""

    # From query to step size, [B', T', H, ...] each: the first arguments of `banked_delta_rule`.
    operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    bank_weights: BankWeights
    past: Tensor  # [B', kernel - 1, 3 d], of the convolution, after these tokens


class StepProjection(nn.Linear):
    """Projects tokens [n, d] to logits of the step size of each head [n, H].

    It starts at about a quarter of the largest step size: half the error for one of 2, as in DeltaNet.
    """

    def initial_bias(self) -> Tensor:
        """Returns the bias [H], the logit of a quarter."""
        return torch.full_like(self.bias, -math.log(3))


class BankedDeltaRule(BankMixer):
    """Fast weights in S*N memories per head, with keys and queries of length 1.

    Its state cannot be reversed: a step size of 1 forgets what the memories held for a key.
    """

    # A memory of a few tokens would lose the state that it tracks. Corrections make forgetting needless.
    half_life_factor = 16.0

    state_type = DeltaBankState

    def __init__(self, config: StackformerConfig):
        super().__init__(config)
        self.max_step_size = config.max_step_size
        self.step_proj = StepProjection(config.core_size, self.num_heads)

    def state_spec(self) -> StateSpec:
        """Specifies the memories, and the last inputs of the convolution."""
        memories = (self.num_heads, self.num_memories, self.head_dim, self.head_dim)
        return TensorSpec("memory", memories), self.past_spec

    def project(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: DeltaBankState | None
    ) -> DeltaBankInputs:
        """Computes the inputs of the recurrence. Of `state`, only `past` is read."""
        weights = self.route(hidden, pointer.dtype)
        read, write = _unit_length(weights.read), _unit_length(weights.write)
        addressed = [
            address_memories(pointer, weight) for weight in (read, write, weights.log_decay)
        ]  # [n, H, R] each
        rows, read, write, log_decay, step_size = layout.to_rows(
            self.qkv_proj(hidden), *addressed, weights.step_size
        )
        rows, past = self.convolve_heads(rows, None if state is None else state.past, layout)
        query, key, value = nn.functional.silu(rows).unbind(2)  # [B', T', H, K] each
        dtype = at_least_float32(hidden)
        query, key = unit_length(query.to(dtype)), unit_length(key.to(dtype))
        return DeltaBankInputs((query, key, value, read, write, log_decay, step_size), weights, past)

    def decode_token(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout | None, state: DeltaBankState
    ) -> Mixed:
        """See [`BankMixer.decode_token`]."""
        weights = self.route(hidden, pointer.dtype)
        mixed, new = decode_token(
            self.qkv_proj(hidden),
            self.conv.weight,
            pointer,
            (_unit_length(weights.read), _unit_length(weights.write), weights.log_decay),
            self.norm.weight,
            self.gate_proj(hidden),
            state,
            cast(float, self.norm.eps),
            step_size=weights.step_size,
            rows=None if layout is None else layout.rows,
            in_place=layout is not None,
        )
        return self.o_proj(mixed), DeltaBankState(*new) if layout is None else state, weights

    def route(self, hidden: Tensor, dtype: torch.dtype) -> BankWeights:
        """See [`BankMixer.route`]. The step size is between 0 and `max_step_size`, and reaches both."""
        step_size = self.max_step_size * stretched_sigmoid(self.step_proj(hidden).to(dtype))
        return super().route(hidden, dtype)._replace(step_size=step_size)

    def mix(
        self, hidden: Tensor, inputs: DeltaBankInputs, layout: TokenLayout, state: DeltaBankState | None
    ) -> tuple[Tensor, DeltaBankState, BankWeights]:
        """Corrects and then reads the memories, in the order of the tokens."""
        mixed, memory = banked_delta_rule(
            *inputs.operands,
            initial_state=None if state is None else state.memory,
            chunk_size=self.chunk_size,
            max_decay=self.max_decay_rate,
        )
        return self.read_out(hidden, mixed, layout), DeltaBankState(memory, inputs.past), inputs.bank_weights


def stretched_sigmoid(logits: Tensor) -> Tensor:
    """A sigmoid stretched to -0.02 and 1.02 and clipped to 0 and 1 (Louizos et al. 2018, arXiv 1712.01312).

    A sigmoid never reaches its ends. A memory that is flipped by 1.98 of its error in place of 2 has lost
    four fifths after 80 flips, so what is learned on short texts does not hold on long ones.
    """
    return (1.04 * logits.sigmoid() - 0.02).clamp(0, 1)


def _unit_length(shares: Tensor) -> Tensor:
    """Returns the weights of banks [n, H, N] whose squares are `shares`; 0 for a bank that is not used.

    So a query that equals a key, and reads the banks with the weights of its write, reads what a full
    correction wrote. The root has no gradient at 0.
    """
    return shares.clamp(min=torch.finfo(shares.dtype).tiny).sqrt() * (shares > 0)


__all__ = ["BankedDeltaRule", "DeltaBankState"]
